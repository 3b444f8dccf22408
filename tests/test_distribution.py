"""The same losses on several devices as on one, in processes that have several."""

import json

import keras
import numpy as np
import pytest
from processes import finish_all, free_ports, run, script_of_the_guide, start

import keras_lora

EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"
TENSORFLOW = """
import json
import tensorflow as tf
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0],
    [tf.config.LogicalDeviceConfiguration()] * 2,
)
def compiled(wrap):
    keras.utils.set_random_seed(0)
    model = build()
    for layer in model.layers:
        layer.lora.b.assign(np.ones(layer.lora.b.shape))
    sgd = keras.optimizers.SGD(0.1, momentum=0.5, weight_decay=0.3)
    model.compile(wrap(sgd), "mse", jit_compile=False)
    return model
def changes(model):
    before = [v.numpy() for v in model.trainable_variables]
    model.fit(x, y, batch_size=32, verbose=0)
    after = [v.numpy() for v in model.trainable_variables]
    names = [v.name for v in model.trainable_variables]
    return [(n, (a - b).tolist()) for n, a, b in zip(names, after, before)]
def plus(sgd):
    return keras_lora.LoRAPlus(sgd, 4.0)
one = [losses(build()), changes(compiled(lambda sgd: sgd)), losses(compiled(plus))]
keras.utils.set_random_seed(0)
with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
    several = [losses(build()), changes(compiled(plus)), losses(compiled(plus))]
print(json.dumps([one, several]))
"""
# Every call comes from outside of the scope that the model was built in. argv: a
# folder, and which strategy. Keras's `fit` does not take that of several workers; its
# `train_step` does, in a loop.
OUTSIDE = """
import contextlib, io, json, os, sys
import tensorflow as tf
from keras_lora.keras_internals import processes
top, kind = sys.argv[1].split()
workers = kind == "workers"
index = json.loads(os.environ["TF_CONFIG"])["task"]["index"] if workers else 0
if kind != "mirrored":  # the guide's script makes the strategy of several workers
    names, printed = {}, io.StringIO()
    os.chdir(top)
    with contextlib.redirect_stdout(printed):
        exec(script, names)
    strategy = names["strategy"]
if kind == "mirrored":
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * 2,
    )
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
scope = contextlib.nullcontext if kind == "one" else strategy.scope
rows = slice(16 * index, 16 * index + 16) if workers else slice(None)
folder = os.path.join(top, kind)
processes.MEETING_SECONDS = 200  # of a machine that does much else
def plain():
    layers = [keras.layers.Dense(16, activation="tanh", name="wide")]
    layers.append(keras.layers.Dense(3, name="head"))
    return keras.Sequential([keras.Input((6,)), *layers])
def built():
    keras.utils.set_random_seed(0)
    with scope():
        model = plain()
        model.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=False)
    return model
def adapted(model, **options):
    keras_lora.apply_lora(model, rank=2, target=["wide"], **options)
    return model
def losses(model, callbacks=()):
    if not workers:
        return model.fit(
            x, y, batch_size=32, epochs=2, verbose=0, shuffle=False,
            callbacks=list(callbacks),
        ).history["loss"]
    found, callbacks = [], keras.callbacks.CallbackList(callbacks, model=model)
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(32)
    options = tf.data.Options()
    policy = tf.data.experimental.AutoShardPolicy.DATA
    options.experimental_distribute.auto_shard_policy = policy
    batches = strategy.experimental_distribute_dataset(data.with_options(options))
    with scope():
        model.optimizer.build(model.trainable_variables)
    @tf.function
    def step(batch):
        strategy.run(model.train_step, args=(batch,))
    callbacks.on_train_begin()
    for epoch in range(2):
        callbacks.on_epoch_begin(epoch)
        model.reset_metrics()
        for batch in batches:
            step(batch)
        found.append(float(model.metrics[0].result()))
        callbacks.on_epoch_end(epoch, {"loss": found[-1]})
    callbacks.on_train_end()
    return found
def outputs(model):
    return model.predict(x, verbose=0)[:, 0].tolist()
def caught(call):
    try:
        call()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["nothing", ""]
def calls():
    found, best = {}, os.path.join(folder, "best")
    model = adapted(built(), also_train=["head"])
    found["losses"] = losses(model)
    keras_lora.save_adapter(model, folder)
    found["file"] = sum(
        float(np.abs(value).sum())
        for value in keras_lora.Adapter.read(folder).tensors.values()
    )
    with keras_lora.merged(model):
        wide = model.get_layer("wide")
        kernels = wide.lora.stand_in.kernel, wide.kernel
        assert type(kernels[0].value) is type(kernels[1].value)
        found["merged"] = outputs(model)
    with keras_lora.disabled(model):
        found["disabled"] = outputs(model)
    artifact = os.path.join(folder, "artifact")
    keras_lora.export(model, artifact)
    served = tf.saved_model.load(artifact)
    found["exported"] = served.serve(x).numpy()[:, 0].tolist()
    losses(model, [keras_lora.AdapterCheckpoint(best)])
    keras_lora.merge_lora(model)
    found["merged for good"] = losses(model)
    other = built()
    keras_lora.load_adapter(other, folder)
    found["loaded"] = losses(other)
    keras_lora.load_adapter(other, best)
    found["best"] = losses(other)
    keras_lora.remove_lora(other)
    found["removed"] = losses(other)
    for method in ("pissa", "olora", "orthogonal", "eva"):
        third = adapted(built())
        keras_lora.initialize_lora(third, method, x[rows] if method == "eva" else None)
        found[method] = losses(third)
    found["dora"] = losses(adapted(built(), use_dora=True))
    fifth = adapted(built())
    with scope():  # where Keras wants its optimizers too
        optimizer = keras_lora.LoRAPlus(keras.optimizers.Adam(0.01), 4.0)
        fifth.compile(optimizer, "mse", jit_compile=False)
    found["plus"] = losses(fifth)
    bank = keras_lora.AdapterBank(built(), {"one": folder, "two": best}, 3)
    inputs = {"inputs": x, "adapter": bank.ids(["one"] * 20 + ["two", None] * 6)}
    found["bank"] = bank.predict(inputs, verbose=0)[:, 0].tolist()
    if not workers:  # neither does Keras's `fit` run there
        with scope():
            optimizer = keras.optimizers.Adam(0.01)
        bank.compile(optimizer, "mse", jit_compile=False)
        fitted = bank.fit(
            inputs, y, batch_size=32, epochs=2, verbose=0, shuffle=False
        )
        found["losses of a bank"] = fitted.history["loss"]
        found["bank on a batch"] = bank.train_on_batch(inputs, y)
        trained = bank.predict(inputs, verbose=0)
        found["bank trained"] = trained[:, 0].tolist()
    bank.add("three", best)
    with bank.rows(["three"] * 32):
        found["rows"] = np.asarray(bank.model(x))[:, 0].tolist()
    bank.release()
    found["released"] = losses(bank.model)
    if not workers:  # nor can Keras's int8 kernels be made there
        last = built()
        with scope():
            last.quantize("int8", filters=["wide"])
        adapted(last)
        keras_lora.merge_lora(last, quantized="dequantize")
        found["int8"] = losses(last)
    return found
def errors():
    own, model = os.path.join(folder, f"own {index}"), adapted(built())
    adapter, before = keras_lora.Adapter.read(folder), model.get_weights()
    found = {}
    def said(name, call):
        found[name] = caught(call)
        assert all(map(np.array_equal, model.get_weights(), before))
    if index == 0:
        adapter.save(own)
    said("seen by one", lambda: keras_lora.load_adapter(model, own))
    if index == 1:
        for value in adapter.tensors.values():
            value += 1
        adapter.save(own)
    said("other files", lambda: keras_lora.load_adapter(model, own))
    keras.utils.set_random_seed(index)
    said("other seeds", lambda: keras_lora.initialize_lora(model, "orthogonal"))
    return found
results = {"calls": calls()}
if kind != "mirrored":
    results["script"] = float(printed.getvalue().split()[-1])
if workers:
    results["errors"] = errors()
if kind == "mirrored":
    refused, model = [], plain()
    with strategy.scope():
        for call in (
            lambda: keras_lora.apply_lora(model, rank=2, target=["wide"]),
            lambda: keras_lora.load_adapter(model, folder),
        ):
            refused.append(caught(call))
    assert type(model.layers[0]) is keras.layers.Dense
    results["refused"] = refused
print(json.dumps(results))
"""
# A loop with DistributedDataParallel: each process has its half of the rows, and the
# first one alone saves, as users of torch do. The guide's script runs before.
TORCH = """
import contextlib, io, json, os, sys, warnings
import torch
*numbers, folder = sys.argv[1].split()
size, index, port = map(int, numbers)
printed = io.StringIO()
os.chdir(os.path.dirname(folder))
with contextlib.redirect_stdout(printed):
    exec(script, {})
rows = slice(None)
if size > 1:
    torch.distributed.init_process_group(
        "gloo", f"tcp://127.0.0.1:{port}", rank=index, world_size=size
    )
    rows = slice(index, None, size)
layers = [keras.layers.Dense(16, activation="tanh", name="up"), keras.layers.Dense(3)]
model = keras.Sequential([keras.Input((6,)), *layers])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    keras_lora.apply_lora(model, rank=2, target=["up"])
said = [str(w.message) for w in caught if "process group" in str(w.message)]
assert all(w.filename == "<string>" for w in caught)
parallel = model
if size > 1:
    parallel = torch.nn.parallel.DistributedDataParallel(model)
lora = model.layers[0].lora
factors = [lora.a.value, lora.b.value]
sgd = torch.optim.SGD(factors, 0.1)
for _ in range(3):
    sgd.zero_grad()
    error = parallel(torch.tensor(x[rows]), training=True) - torch.tensor(y[rows])
    (error**2).mean().backward()
    sgd.step()
if index == 0:
    keras_lora.save_adapter(model, folder)
found = [f.detach().cpu().numpy().tolist() for f in factors]
print(json.dumps([said, found, float(printed.getvalue().split()[-1])]))
"""
JAX = """
import json
import jax
devices = keras.distribution.list_devices("cpu")
mesh = keras.distribution.DeviceMesh((2, 4), ["batch", "model"], devices)
layouts = keras.distribution.LayoutMap(mesh)
layouts[".*wide/kernel"] = (None, "model")
found = []
for distribution in (
    None,
    keras.distribution.DataParallel(devices=devices),
    keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch"),
):
    keras.distribution.set_distribution(distribution)
    keras.utils.set_random_seed(0)
    model = build()
    found.append(losses(model))
wide = model.get_layer("wide")
spec = [str(v.value.sharding.spec) for v in (wide.kernel, wide.lora.b, wide.lora.a)]
assert "model" in spec[0] and "model" in spec[1] and "model" not in spec[2], spec
moments = [v for v in model.optimizer.variables if v.shape == wide.lora.b.shape]
assert moments
assert all("model" in str(v.value.sharding.spec) for v in moments)
shards = {shard.data.shape for shard in wide.lora.b.value.addressable_shards}
assert shards == {(2, 4)}, shards
print(json.dumps(found))
"""

# With KerasHub's own maps: Llama's has the two mesh axes the other way round than
# Gemma's in attention, and the factors follow their kernels either way.
KERAS_HUB = """
import collections, json, sys
import keras_hub
from benchmarks import devices
sizes = dict(vocabulary_size=64, num_layers=1, num_query_heads=4,
    num_key_value_heads=4, hidden_dim=16, intermediate_dim=32)
KINDS = {
    "Llama": (keras_hub.models.LlamaBackbone, sizes),
    "Gemma": (keras_hub.models.GemmaBackbone, {**sizes, "head_dim": 4}),
}
ids = {"token_ids": random.integers(0, 64, (8, 6)), "padding_mask": np.ones((8, 6))}
targets = random.standard_normal((8, 6, 16), "float32")
def trained(kind):
    keras.utils.set_random_seed(0)
    backbone_class, arguments = KINDS[kind]
    model = backbone_class(**arguments)
    keras_lora.apply_lora(model, rank=2, target="all-linear")
    for variable in model.trainable_variables:
        variable.assign(0.1 * random.standard_normal(variable.shape))
    model.compile("sgd", "mse")
    fitted = model.fit(ids, targets, epochs=2, batch_size=8, verbose=0)
    return model, fitted.history["loss"]
def parts(variable):
    shard = variable.value.addressable_shards[0].data.shape
    return [n // part for n, part in zip(variable.shape, shard)]
for kind in KINDS:
    random = np.random.default_rng(1)
    _, one = trained(kind)
    mesh = keras.distribution.DeviceMesh(
        (2, 4), ["batch", "model"], keras.distribution.list_devices("cpu")
    )
    layouts = KINDS[kind][0].get_layout_map(mesh)
    keras.distribution.set_distribution(
        keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
    )
    random = np.random.default_rng(1)
    model, several = trained(kind)
    np.testing.assert_allclose(several, one, rtol=1e-5)
    found = 0
    for layer in model._flatten_layers():
        lora = getattr(layer, "lora", None)
        if lora is None:
            continue
        form, kernel = lora.form, parts(layer.frozen_kernel)
        inputs = [kernel[axis] for axis in form.input_axes]
        new = [n for axis, n in enumerate(kernel) if axis not in form.input_axes]
        assert parts(lora.a) == [*inputs, 1], (layer.path, parts(lora.a), kernel)
        assert parts(lora.b) == [1, *new], (layer.path, parts(lora.b), kernel)
        found += max(kernel) > 1
    assert found >= 6, found
    layers = [x for x in model._flatten_layers() if getattr(x, "lora", None)]
    with keras_lora.merged(model):
        for layer in layers:
            merged, kernel = layer.lora.stand_in.kernel, layer.frozen_kernel
            assert merged.value.sharding == kernel.value.sharding, layer.path
    def build():
        model = backbone_class(**arguments)
        keras_lora.apply_lora(model, rank=2, target="all-linear")
        model.compile("adam", "mse")
        return model
    backbone_class, arguments = KINDS[kind]
    planned, measured = devices.planned(build, 8, 6), collections.Counter()
    real = build()
    real.optimizer.build(real.trainable_variables)
    for variable in [*real.variables, *real.optimizer.variables]:
        is_moment = any(variable is each for each in real.optimizer.variables)
        column = "moments" if is_moment else devices.kind_of(variable)
        measured[column] += variable.value.addressable_shards[0].data.nbytes
    assert planned.pop("activations") > 0
    assert planned == measured, (planned, measured)
    model.save(f"{sys.argv[1]}/{kind}.keras")
    keras_lora.save_adapter(model, f"{sys.argv[1]}/{kind}")
    outputs = model.predict(ids, verbose=0)
    again = keras.models.load_model(f"{sys.argv[1]}/{kind}.keras")
    keras_lora.remove_lora(model)
    keras_lora.load_adapter(model, f"{sys.argv[1]}/{kind}")
    for other in (again, model):
        np.testing.assert_allclose(other.predict(ids, verbose=0), outputs, atol=1e-6)
    keras.distribution.set_distribution(None)
print(json.dumps([]))
"""

# A token table that is cut along its ids, and DoRA's magnitudes, as their kernels are;
# and one warning for what does not divide over the devices.
TABLES = """
import json, warnings
def network():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([
        keras.Input((5,), dtype="int32"),
        keras.layers.Embedding(16, 8, name="table"),
        keras.layers.Dense(8, name="wide"),
    ])
    keras_lora.apply_lora(model, rank=2, target=["table", "wide"], use_dora=True)
    random = np.random.default_rng(1)
    for variable in model.trainable_variables:
        variable.assign(variable + 0.1 * random.standard_normal(variable.shape))
    model.compile("sgd", "mse")
    ids = random.integers(0, 16, (8, 5))
    targets = random.standard_normal((8, 5, 8), "float32")
    found = model.fit(ids, targets, epochs=2, batch_size=8, verbose=0).history["loss"]
    return model, found
def spec(variable):
    return tuple(variable.value.sharding.spec)
_, one = network()
odd = [keras.layers.Dense(10, name=f"odd{i}") for i in range(2)]
odd = keras.Sequential([keras.Input((6,)), *odd])
mesh = keras.distribution.DeviceMesh(
    (2, 4), ["batch", "model"], keras.distribution.list_devices("cpu")
)
layouts = keras.distribution.LayoutMap(mesh)
layouts[".*(wide|odd.)/kernel"] = (None, "model")
layouts[".*/embeddings"] = ("model", None)
keras.distribution.set_distribution(
    keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
)
model, several = network()
np.testing.assert_allclose(several, one, rtol=1e-5)
table, wide = (model.get_layer(name).lora for name in ("table", "wide"))
found = [spec(v) for layer in (table, wide) for v in layer.named_factors().values()]
assert found == [
    ("model", None), (None, None), (), (None, None), (None, "model"), ("model",)
], found
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    keras_lora.apply_lora(odd, rank=2, target=["odd0", "odd1"])
messages = [str(w.message) for w in caught if "does not divide" in str(w.message)]
assert len(messages) == 1 and "odd0/lora/b" in messages[0], messages
assert spec(odd.layers[1].lora.b) == (None, None)
print(json.dumps([]))
"""

# A cell's kernels, stacks of experts and rows of a table: the factors lie as the axes
# of their kernel do, and W + delta as W.
EVERY_WEIGHT = """
import json
import keras_hub
sizes = dict(vocabulary_size=8, num_layers=1, num_query_heads=2,
    num_key_value_heads=2, hidden_dim=4, intermediate_dim=4, moe_intermediate_dim=4,
    shared_expert_intermediate_dim=4, num_experts=4, top_k=2)
backbone = keras_hub.models.QwenMoeBackbone(**sizes)
experts = [
    x for x in backbone._flatten_layers() if type(x).__name__ == "QwenMoeExperts"
]
GATE, OUTPUT = (f"expert_feedforward_{x}_dense" for x in ("gate", "output"))
class Mixture(keras.layers.Layer):
    def build(self, input_shape):
        self.bank = type(experts[0])(4, 48, 8, name="bank")
        self.bank.build(input_shape)
        self.built = True
    def call(self, inputs):
        return keras.ops.sum(self.bank(inputs), axis=0)
def network():
    keras.utils.set_random_seed(0)
    ids = keras.Input((5,), dtype="int32")
    x = keras.layers.Embedding(16, 8, name="table")(ids)
    x = keras.layers.LSTM(8, return_sequences=True, name="lstm")(x)
    x = keras.layers.Conv1DTranspose(8, 2, name="up")(x)
    x = Mixture(name="mixture")(keras.layers.Reshape((48,))(x))
    model = keras.Model(ids, keras.layers.Dense(2, name="head")(x))
    keras_lora.apply_lora(
        model, rank=2, target=["lstm", "up", "mixture/bank"],
        trainable_token_indices=[3, 9],
    )
    random = np.random.default_rng(1)
    for variable in model.trainable_variables:
        variable.assign(variable + 0.1 * random.standard_normal(variable.shape))
    model.compile("sgd", "mse")
    ids = random.integers(0, 16, (8, 5))
    ids[:, 0] = 3
    targets = random.standard_normal((8, 2), "float32")
    found = model.fit(ids, targets, epochs=2, batch_size=8, verbose=0).history["loss"]
    return model, found, model.predict(ids, verbose=0)
def spec(value):
    found = tuple(value.sharding.spec)
    return found + (None,) * (value.ndim - len(found))
_, one, outputs = network()
mesh = keras.distribution.DeviceMesh(
    (1, 4), ["batch", "model"], keras.distribution.list_devices("cpu")
)
layouts = keras.distribution.LayoutMap(mesh)
layouts["lstm/.*kernel"] = (None, "model")
layouts["up/kernel"] = (None, "model", None)
layouts["mixture/bank/expert.*"] = ("model", None, None)
layouts["table/embeddings"] = (None, "model")
keras.distribution.set_distribution(
    keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
)
model, several, found = network()
np.testing.assert_allclose(several, one, rtol=1e-5)
np.testing.assert_allclose(found, outputs, rtol=1e-4, atol=1e-5)
cut, stack = (None, "model"), ("model", None, None)
expected = {
    "table": [cut],
    "lstm/kernel": [(None, None), cut],
    "lstm/recurrent_kernel": [(None, None), cut],
    "up": [(None, None), (None, None, "model")],
    f"mixture/bank/{GATE}": [stack, stack],
    f"mixture/bank/{OUTPUT}": [stack, stack],
}
found = {}
for row in keras_lora.summary(model):
    site = row.layer.sites()[row.weight]
    found[row.path] = [spec(x.value) for x in site.lora.named_factors().values()]
    assert spec(site.merged_kernel("float32")) == spec(site.frozen_kernel.value)
assert found == expected, found
print(json.dumps([]))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="tf.distribute is TensorFlow's"
)
def test_mirrored_strategy():
    (one, plain, plus), (several, changed, mirrored) = run(TENSORFLOW, "")
    np.testing.assert_allclose(several, one, rtol=1e-5)
    # LoRAPlus: one step of SGD from equal values changes in proportion to the rate.
    np.testing.assert_allclose(mirrored, plus, rtol=1e-5)
    assert {name for name, _ in plain} == {"a", "b", "bias"}
    for (name, slow), (_, found) in zip(plain, changed, strict=True):
        expected = np.array(slow) * (4 if name == "b" else 1)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def worker_settings() -> list:
    """TF_CONFIG of each of two workers."""
    cluster = {"worker": [f"localhost:{port}" for port in free_ports(2)]}
    tasks = [{"type": "worker", "index": index} for index in range(2)]
    return [json.dumps({"cluster": cluster, "task": task}) for task in tasks]


def assert_equal_calls(several, one):
    assert several.keys() <= one.keys() and len(several) > 15
    for key, found in several.items():
        np.testing.assert_allclose(found, one[key], rtol=1e-4, atol=1e-5, err_msg=key)


def outside() -> str:
    return f"script = {script_of_the_guide('tensorflow')!r}\n{OUTSIDE}"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run(outside(), f"{tmp_path_factory.mktemp('one')} one")


@pytest.fixture(scope="module")
def one_device(alone):
    return alone["calls"]


@pytest.mark.slow
@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="tf.distribute is TensorFlow's"
)
def test_calls_from_outside_of_the_scope(tmp_path, one_device):
    found = run(outside(), f"{tmp_path} mirrored")
    assert found["calls"].keys() == one_device.keys()
    assert_equal_calls(found["calls"], one_device)
    assert len(found["refused"]) == 2
    for kind, text in found["refused"]:
        assert kind == "ValueError" and "was not built in the scope" in text


@pytest.mark.slow
@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="tf.distribute is TensorFlow's"
)
def test_two_workers(tmp_path, alone):
    started = [
        start(outside(), f"{tmp_path} workers", TF_CONFIG=config)
        for config in worker_settings()
    ]
    results = finish_all(started)
    for found in results:
        assert_equal_calls(found["calls"], alone["calls"])
        np.testing.assert_allclose(found["script"], alone["script"], rtol=1e-5)
        assert "different files" in found["errors"]["other files"][1]
        assert "different values for A and B" in found["errors"]["other seeds"][1]
    first, second = (found["errors"] for found in results)
    assert second["seen by one"][0] == "FileNotFoundError"
    assert first["seen by one"][0] == "OSError"
    assert "Process 1" in first["seen by one"][1]


@pytest.mark.slow
@pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="process groups are torch's"
)
def test_a_process_group_is_warned_of_and_trains_in_a_loop(tmp_path):
    port, other = free_ports(2)
    folders = tmp_path / "several/adapter", tmp_path / "one/adapter"
    for folder in folders:
        folder.parent.mkdir()
    program = f"script = {script_of_the_guide('torch')!r}\n{TORCH}"
    settings = {"ADDRESS": f"127.0.0.1:{other}", "PROCESSES": "2"}
    processes = [
        start(program, f"2 {i} {port} {folders[0]}", **settings, PROCESS=f"{i}")
        for i in range(2)
    ]
    several = finish_all(processes)
    nothing, one, loss = run(program, f"1 0 0 {folders[1]}")
    assert nothing == []
    for said, found, own_loss in several:
        assert len(said) == 1 and "trains each of them alone" in said[0]
        np.testing.assert_allclose(own_loss, loss, rtol=1e-5)
        for own, expected in zip(found, one, strict=True):
            np.testing.assert_allclose(own, expected, atol=1e-6)
    saved, alone = (keras_lora.Adapter.read(folder).tensors for folder in folders)
    assert saved.keys() == alone.keys()
    for key, value in saved.items():
        np.testing.assert_allclose(value, alone[key], atol=1e-6)


on_jax = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="Keras has it on JAX"
)


@on_jax
def test_factors_lie_as_their_kernels_do(tmp_path):
    run(KERAS_HUB, str(tmp_path), XLA_FLAGS=EIGHT_DEVICES)


@on_jax
def test_tables_and_lengths_lie_as_their_kernels_do():
    run(TABLES, "", XLA_FLAGS=EIGHT_DEVICES)


@on_jax
def test_factors_of_every_weight_lie_as_their_kernels_do():
    run(EVERY_WEIGHT, "", XLA_FLAGS="--xla_force_host_platform_device_count=4")


@on_jax
def test_data_and_model_parallel():
    one, *several = run(JAX, "", XLA_FLAGS=EIGHT_DEVICES)
    for found in several:
        np.testing.assert_allclose(found, one, rtol=1e-5)
