"""One model over two processes of JAX: every call gives what one process gives."""

import re
from pathlib import Path

import keras
import numpy as np
import pytest
from processes import finish, free_ports, start

pytestmark = [
    pytest.mark.skipif(
        keras.backend.backend() != "jax", reason="Keras has it on JAX alone"
    ),
    pytest.mark.slow,
]

# argv: one process's "none", or how the model lies over two of two devices each, then
# a folder, the port of the first and this one's number.
BEGIN = """
import json, os, sys, time
import jax
from keras import distribution as keras_distribution
from keras_lora.keras_internals import distribution, processes
kind, folder, port, index = sys.argv[1].split()
index = int(index)
if kind != "none":
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    keras_distribution.initialize(f"127.0.0.1:{port}", 2, index)
    devices = keras_distribution.list_devices("cpu")
if kind == "data":
    keras_distribution.set_distribution(
        keras_distribution.DataParallel(devices=devices, auto_shard_dataset=False)
    )
elif kind != "none":
    shape = (2, 2) if kind == "model" else (1, 4)
    mesh = keras_distribution.DeviceMesh(shape, ["batch", "model"], devices)
    layouts = keras_distribution.LayoutMap(mesh)
    layouts[".*(up|head)/kernel"] = (None, "model")
    layouts[".*down/kernel"] = ("model", None)
    layouts[".*embed/embeddings"] = (None, "model")
    keras_distribution.set_distribution(
        keras_distribution.ModelParallel(
            layout_map=layouts, batch_dim_name="batch", auto_shard_dataset=False
        )
    )
keras.utils.set_random_seed(0)
random = np.random.default_rng(0)
ids = random.integers(0, 16, (16, 3))
targets = random.standard_normal((16, 4), "float32")
# A batch is this process's part of it where the batch is cut over processes.
part = slice(8 * index, 8 * index + 8) if kind in ("data", "model") else slice(None)
# Keras's `initialize` seeds what it was not told: the weights come from NumPy.
def network():
    layers = [
        keras.layers.Embedding(16, 8, name="embed"),
        keras.layers.Dense(8, activation="tanh", name="up"),
        keras.layers.Dense(8, name="down"),
        keras.layers.GlobalAveragePooling1D(),
        keras.layers.Dense(4, name="head"),
    ]
    model = keras.Sequential([keras.Input((3,), dtype="int32"), *layers])
    values = np.random.default_rng(1)
    for variable in model.trainable_variables:
        value = values.standard_normal(variable.shape).astype("float32")
        variable.assign(0.5 * value)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model
def adapt(model, **options):
    keras_lora.apply_lora(
        model, rank=2, target=["embed", "up", "down"], also_train=["head"], **options
    )
    values = np.random.default_rng(2)
    for layer in model.layers:
        if hasattr(layer, "lora"):
            for factor in layer.lora.named_factors().values():
                value = values.standard_normal(factor.shape).astype("float32")
                factor.assign(0.5 * value)
    return model
def fit(model, **options):
    batch = 8 if kind in ("data", "model") else 16
    return model.fit(
        ids[part], targets[part], batch_size=batch, epochs=2, verbose=0,
        shuffle=False, **options
    ).history["loss"]
def weights(model):
    return [distribution.fetch(v).tolist() for v in model.weights]
def is_same(model, values):
    now = weights(model)
    return len(now) == len(values) and all(map(np.array_equal, now, values))
def outputs(model):
    inputs = keras_distribution.distribution()
    x = keras.ops.convert_to_tensor(ids, dtype="int32")
    if inputs is not None:
        layout = keras_distribution.TensorLayout([None, None], inputs.device_mesh)
        x = jax.device_put(ids.astype("int32"), layout.backend_layout)
    return distribution.fetch(model(x)).tolist()
found = {}
"""

CALLS = (
    BEGIN
    + """
folders = [os.path.join(folder, name) for name in ("saved", "by_epoch")]
model = adapt(network())
if kind in ("model", "across"):
    held = model.get_layer("up").lora.b.value.addressable_shards[0].data.shape
    assert held == (2, 8 // mesh.shape[1]), held
checkpoint = keras_lora.AdapterCheckpoint(folders[1])
found["losses"] = fit(model, callbacks=[checkpoint])
keras_lora.save_adapter(model, folders[0])
for place in folders:
    adapter = keras_lora.Adapter.read(place)
    found[f"file {place == folders[0]}"] = [
        adapter.tensors[key].tolist() for key in sorted(adapter.tensors)
    ]
trained = weights(model)
found["trained"], found["outputs"] = trained, outputs(model)
for variable in model.trainable_variables:
    variable.assign(0 * variable)
keras_lora.load_adapter(model, folders[0])
assert is_same(model, trained)
with keras_lora.disabled(model):
    found["disabled"] = outputs(model)
with keras_lora.merged(model):
    found["merged"] = outputs(model)
assert is_same(model, trained)
other = network()
keras_lora.load_adapter(other, folders[1])
found["loaded"] = outputs(other)
found["losses after loading"] = fit(other)
keras_lora.remove_lora(other)
found["removed"] = weights(other)
keras_lora.merge_lora(model)
found["merged for good"] = weights(model)
extracted = keras_lora.extract_adapter(other, model, rank=2)
found["extracted"] = max(extracted.errors.values())
keras_lora.load_adapter(other, extracted)
found["again"] = outputs(other)
for method in ("pissa", "orthogonal"):
    keras.utils.set_random_seed(3)
    np.random.seed(3)
    model = network()
    keras_lora.apply_lora(model, rank=2, target=["up", "down"])
    before = outputs(model)
    keras_lora.initialize_lora(model, method)
    np.testing.assert_allclose(outputs(model), before, atol=1e-5)
    if method == "pissa":
        found["losses of pissa"] = fit(model)
        kernel = model.get_layer("up").lora
        found["pissa"] = distribution.fetch(kernel.a @ kernel.b).tolist()
    else:
        columns = distribution.fetch(model.get_layer("up").lora.a)
        found["angles"] = (columns.T @ columns).tolist()[0][1]
print(json.dumps(found))
"""
)


ERRORS = (
    BEGIN
    + """
import resource
processes.MEETING_SECONDS = 3
own, shared = os.path.join(folder, f"own {index}"), os.path.join(folder, "shared")
model = adapt(network())
before = weights(model)
keras_lora.save_adapter(model, shared)
adapter = keras_lora.Adapter.read(shared)
def said(function, *arguments):
    try:
        function(*arguments)
    except Exception as error:
        assert is_same(model, before)
        assert [type(x).__name__ for x in model.layers[:1]] == ["LoRAEmbedding"]
        return [type(error).__name__, str(error)]
    return ["nothing", ""]
if index == 0:
    adapter.save(own)
found["seen by one"] = said(keras_lora.load_adapter, model, own)
if index == 1:
    for value in adapter.tensors.values():
        value += 1
    adapter.save(own)
found["other files"] = said(keras_lora.load_adapter, model, own)
fresh = network()
keras_lora.apply_lora(fresh, rank=2, target=["up"])
start = weights(fresh)
own_start = lambda layer: (np.full((8, 2), index + 1.0), np.zeros((2, 8)))
found["other starts"] = said(keras_lora.initialize_lora, fresh, own_start)
assert is_same(fresh, start)
full = os.path.join(folder, "full")
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
if index == 0:  # as a disk that is full
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
found["full"] = said(keras_lora.save_adapter, model, full)
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
found["left of it"] = os.listdir(full) if os.path.exists(full) else []
for name, call, others in (
    ("alone saves", lambda: keras_lora.save_adapter(model, shared), 1),
    ("alone merges", lambda: keras_lora.merge_lora(model), 0),
):
    mark = os.path.join(folder, name)
    if index == others:
        while not os.path.exists(mark):
            time.sleep(0.1)
        found[name] = None
    else:
        try:
            call()
        except Exception as error:
            found[name] = [type(error).__name__, str(error)]
        open(mark, "w").close()
keras_lora.save_adapter(model, shared)  # and all goes on where they do it together
keras_lora.load_adapter(model, shared)
assert is_same(model, before)
print(json.dumps(found))
"""
)


def run_two(program, kind, folder):
    (port,) = free_ports(1)
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    started = [
        start(program, f"{kind} {folder} {port} {index}", **flags) for index in range(2)
    ]
    try:
        return [finish(process, 120) for process in started]
    finally:
        for process in started:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process finds."""
    folder = tmp_path_factory.mktemp("alone")
    return finish(start(CALLS, f"none {folder} 0 0"), 120)


@pytest.mark.parametrize("kind", ["data", "model", "across"])
def test_calls_give_what_one_process_gives(kind, alone, tmp_path):
    for found in run_two(CALLS, kind, tmp_path):
        assert found.keys() == alone.keys()
        for key, value in found.items():
            for own, expected in zip(*map(as_list, (value, alone[key])), strict=True):
                np.testing.assert_allclose(own, expected, atol=2e-6, err_msg=key)


def as_list(value):
    return value if isinstance(value, list) else [value]


@pytest.mark.parametrize("kind", ["data", "across"])
def test_what_fails_on_one_process_fails_on_all(kind, tmp_path):
    first, second = run_two(ERRORS, kind, tmp_path)
    kind_of_error, text = second["seen by one"]
    assert kind_of_error == "FileNotFoundError"
    assert first["seen by one"][0] == "OSError"
    assert "Process 1" in first["seen by one"][1] and text in first["seen by one"][1]
    for found in (first, second):
        assert found["other files"][0] == "ValueError"
        assert "other files" in found["other files"][1]
        assert found["other starts"][0] == "ValueError"
        assert "different values for A and B" in found["other starts"][1]
        assert found["full"][0] == "OSError"
        assert found["left of it"] == []
    assert "Process 0" in second["full"][1]
    for kind_of_error, text in (first["alone saves"], second["alone merges"]):
        assert kind_of_error == "RuntimeError"
        assert "all of them have to make each call" in text


def test_the_script_of_the_guide_runs_on_two_processes(tmp_path):
    page = (Path(__file__).parents[1] / "docs/guides/devices.md").read_text()
    scripts = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (script,) = (text for text in scripts if "PROCESSES" in text)
    script = f"import os\nos.chdir({str(tmp_path)!r})\n{script}"
    settings = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}

    def losses(count):
        (port,) = free_ports(1)
        settings.update(ADDRESS=f"127.0.0.1:{port}", PROCESSES=str(count))
        started = [
            start(
                f"{script}import json\nprint(json.dumps(loss))",
                "",
                **settings,
                PROCESS=str(index),
            )
            for index in range(count)
        ]
        return [finish(process, 120) for process in started]

    (one,) = losses(1)
    np.testing.assert_allclose(losses(2), [one, one], atol=1e-6)
