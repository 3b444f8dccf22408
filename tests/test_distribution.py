"""The same losses on several devices as on one; a process for each number of them."""

import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest

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
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=False)
    return model
random = np.random.default_rng(0)
x = random.standard_normal((32, 6), "float32")
y = random.standard_normal((32, 3), "float32")
def losses(model):
    fitted = model.fit(x, y, epochs=3, batch_size=16, verbose=0, shuffle=False)
    return fitted.history["loss"]
"""
TENSORFLOW = """
import json, sys
import tensorflow as tf
devices = int(sys.argv[1])
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0],
    [tf.config.LogicalDeviceConfiguration()] * devices,
)
names = [f"CPU:{i}" for i in range(devices)]
if devices > 1:
    with tf.distribute.MirroredStrategy(names).scope():
        model = build()
else:
    model = build()
print(json.dumps(losses(model)))
"""
JAX = """
import json, sys
import jax
kind, devices = sys.argv[1], keras.distribution.list_devices("cpu")
if kind == "data":
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
elif kind == "model":
    mesh = keras.distribution.DeviceMesh((2, 4), ["batch", "model"], devices)
    layouts = keras.distribution.LayoutMap(mesh)
    layouts[".*wide/kernel"] = (None, "model")
    layouts[".*wide/lora/b"] = (None, "model")
    keras.distribution.set_distribution(
        keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
    )
model = build()
found = losses(model)
if kind == "model":
    wide = model.get_layer("wide")
    spec = [str(v.value.sharding.spec) for v in (wide.kernel, wide.lora.b, wide.lora.a)]
    assert "model" in spec[0] and "model" in spec[1] and "model" not in spec[2], spec
    shards = {shard.data.shape for shard in wide.lora.b.value.addressable_shards}
    assert shards == {(2, 4)}, shards
print(json.dumps(found))
"""


def run(program, argument, **environment):
    done = subprocess.run(
        [sys.executable, "-c", MODEL + program, argument],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="tf.distribute is TensorFlow's"
)
def test_mirrored_strategy():
    one = run(TENSORFLOW, "1")
    for devices in ("2", "4"):
        np.testing.assert_allclose(run(TENSORFLOW, devices), one, rtol=1e-5)


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="Keras has it on JAX")
def test_data_and_model_parallel():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    one = run(JAX, "none", **flags)
    for kind in ("data", "model"):
        np.testing.assert_allclose(run(JAX, kind, **flags), one, rtol=1e-5)
