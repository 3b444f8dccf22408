"""Peak memory of a whole training process, one variant per process."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf

from benchmarks import networks
from benchmarks.timing import Ratio


def peak():
    """Kilobytes: of the first GPU, or of the process where there is none.

    Not ru_maxrss, which a process inherits from the one before it.
    """
    if tf.config.list_physical_devices("GPU"):
        return tf.config.experimental.get_memory_info("GPU:0")["peak"] // 1024
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1])


def grown(network, arguments, variant):
    """What four steps need beyond the imports."""
    from benchmarks.training import keras_step

    before = peak()
    work = getattr(networks, network)(*arguments)
    step = keras_step(work.models[variant](), work)
    for _ in range(4):
        step()
    return peak() - before


# Freed memory goes back at once, in place of when the allocator's own limit, which
# grows with what it has seen, lets it.
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def in_process(network, arguments, variant, env=None):
    """`grown` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", network]
    run = subprocess.run(
        [*command, json.dumps(arguments), variant],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **(env or {})},
        cwd=Path(__file__).parents[1],
    )
    return int(run.stdout.split()[-1])


def exact_step(network, arguments, rounds):
    """`step` with an exact allocator."""
    return step(network, arguments, rounds, EXACT)


def step(network, arguments, rounds, env=None):
    """Every variant over the baseline; the median of `rounds` processes for each."""
    work = getattr(networks, network)(*arguments)
    sizes = {name: [] for name in work.models}
    for _ in range(rounds):
        for name, found in sizes.items():
            found.append(in_process(network, arguments, name, env))
    base = sorted(sizes[work.baseline])[rounds // 2]
    result = {}
    for name, found in sizes.items():
        low, median, high = min(found), sorted(found)[rounds // 2], max(found)
        result[name] = Ratio(median / base, low / base, high / base, low / base)
    return result


def frozen(network, arguments, rounds):
    """The bytes of all that a model holds and does not train."""
    work = getattr(networks, network)(*arguments)
    sizes = {}
    for name, build in work.models.items():
        held = [np.asarray(variable) for variable in build().non_trainable_variables]
        sizes[name] = sum(array.nbytes for array in held)
    base = sizes[work.baseline]
    return {name: Ratio(*[size / base] * 4) for name, size in sizes.items()}


def by_layer(network, arguments, rounds):
    """What a layer more needs, over the baseline's: all else is the same."""
    *arguments, few, many = arguments
    work = getattr(networks, network)(*arguments, few)
    found = {}
    for name in work.models:
        sizes = [
            sorted(
                in_process(network, [*arguments, n], name, EXACT) for _ in range(rounds)
            )
            for n in (few, many)
        ]
        found[name] = [more - less for less, more in zip(*sizes, strict=True)]
    base = found[work.baseline][rounds // 2]
    return {
        name: Ratio(
            *(sorted(x)[place] / base for place in (rounds // 2, 0, rounds - 1, 0))
        )
        for name, x in found.items()
    }


if __name__ == "__main__":
    print(grown(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]))
