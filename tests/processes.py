"""Code that runs in a process of its own."""

import json
import os
import re
import socket
import subprocess
import sys
from concurrent import futures
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs/guides/devices.md"
# A name that only the page's script for several processes has, by backend.
SCRIPTS = {
    "tensorflow": "MultiWorker",
    "jax": "distribution.initialize",
    "torch": "DistributedDataParallel",
}

MODEL = """
import keras, keras_lora
import numpy as np
keras.utils.set_random_seed(0)
def build():
    options = {"rank": 2, "alpha": 3}
    model = keras.Sequential([
        keras.Input((6,)),
        keras_lora.LoRADense(16, activation="tanh", name="wide", **options),
        keras_lora.LoRADense(3, **options),
    ])
    sgd = keras.optimizers.SGD(0.1, momentum=0.5)
    model.compile(sgd, "mse", jit_compile=False)
    return model
random = np.random.default_rng(0)
x = random.standard_normal((32, 6), "float32")
y = random.standard_normal((32, 3), "float32")
def losses(model):
    fitted = model.fit(x, y, epochs=3, batch_size=16, verbose=0, shuffle=False)
    return fitted.history["loss"]
"""


def run(program, argument, **environment):
    return finish(start(program, argument, **environment))


def start(program, argument, **environment):
    flags = [os.environ.get("XLA_FLAGS"), environment.get("XLA_FLAGS")]
    environment["XLA_FLAGS"] = " ".join(filter(None, flags))
    return subprocess.Popen(
        [sys.executable, "-c", MODEL + program, argument],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, seconds=300):
    output, errors = process.communicate(timeout=seconds)
    assert process.returncode == 0, errors[-2000:]
    return json.loads(output.splitlines()[-1])


def finish_all(processes, seconds=300):
    """What processes that wait for each other print; none waits for one that failed."""
    with futures.ThreadPoolExecutor(len(processes)) as pool:
        found = [pool.submit(finish, process, seconds) for process in processes]
        done, _ = futures.wait(found, return_when=futures.FIRST_EXCEPTION)
        failed = [future for future in done if future.exception()]
        for process in processes:
            process.kill()
    return [future.result() for future in failed or found]


def script_of_the_guide(backend):
    """The page's block of code for several processes."""
    blocks = re.findall(
        r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL
    )
    (script,) = (text for text in blocks if SCRIPTS[backend] in text)
    return script


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("localhost", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
