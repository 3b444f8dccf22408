"""The same losses on several devices as on one; a process for each number of them."""

import json
import socket

import keras
import numpy as np
import pytest
from processes import finish
from processes import run
from processes import start

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
# README's section on several machines, here two processes. Keras's `fit` does not
# take this strategy; its `train_step` does.
WORKER = """
import json
import tensorflow as tf
strategy = tf.distribute.MultiWorkerMirroredStrategy()
with strategy.scope():
    model = build()
    model.optimizer.build(model.trainable_variables)
data = tf.data.Dataset.from_tensor_slices((x, y)).batch(16)
options = tf.data.Options()
policy = tf.data.experimental.AutoShardPolicy.DATA
options.experimental_distribute.auto_shard_policy = policy
batches = strategy.experimental_distribute_dataset(data.with_options(options))
@tf.function
def step(batch):
    strategy.run(model.train_step, args=(batch,))
found = []
for epoch in range(3):
    model.reset_metrics()
    for batch in batches:
        step(batch)
    found.append(float(model.metrics[0].result()))
print(json.dumps(found))
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


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("localhost", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="tf.distribute is TensorFlow's"
)
def test_mirrored_strategy():
    one = run(TENSORFLOW, "1")
    for devices in ("2", "4"):
        np.testing.assert_allclose(run(TENSORFLOW, devices), one, rtol=1e-5)


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="tf.distribute is TensorFlow's"
)
def test_two_workers():
    workers = [f"localhost:{port}" for port in free_ports(2)]
    processes = []
    for index in range(2):
        task = {"type": "worker", "index": index}
        config = json.dumps({"cluster": {"worker": workers}, "task": task})
        processes.append(start(WORKER, "", TF_CONFIG=config))
    one = run(TENSORFLOW, "1")
    for process in processes:
        np.testing.assert_allclose(finish(process), one, rtol=1e-5)


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="Keras has it on JAX")
def test_data_and_model_parallel():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    one = run(JAX, "none", **flags)
    for kind in ("data", "model"):
        np.testing.assert_allclose(run(JAX, kind, **flags), one, rtol=1e-5)
