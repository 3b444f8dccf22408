"""One model over two processes of JAX: every call gives what one process gives.

Processes take long to start: two are started once, and go through all of it.
"""

import json
from pathlib import Path

import keras
import numpy as np
import pytest
from processes import finish_all, free_ports, script_of_the_guide, start

pytestmark = [
    pytest.mark.skipif(
        keras.backend.backend() != "jax", reason="Keras has it on JAX alone"
    ),
    pytest.mark.slow,
]

FLAGS = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
MAPS = ("Gemma", "Llama")  # KerasHub's own layout maps
KINDS = ("data", "model", "across")  # how a model lies over the processes

# argv: a folder. The guide's script has begun: these are its processes.
BEGIN = """
import gc, json, os, random as python_random, resource, sys, time
import jax
import keras_hub
import tensorflow as tf
from keras import distribution as keras_distribution
from keras_lora.keras_internals import distribution, processes
from keras_lora.models.sites import adapted_sites
top, index = sys.argv[1], jax.process_index()
devices = keras_distribution.list_devices("cpu")
random = np.random.default_rng(0)
ids = random.integers(0, 16, (16, 3))
targets = random.standard_normal((16, 4), "float32")
backbones = {
    "Gemma": (keras_hub.models.GemmaBackbone, {"head_dim": 4}),
    "Llama": (keras_hub.models.LlamaBackbone, {}),
}
def spread(now):
    # From now on models lie so over the processes; "none": one process alone.
    global kind, folder, part, batch, mesh
    kind, folder = now, os.path.join(top, f"{now} {index if now == 'none' else ''}")
    shape = (1, 4) if kind == "across" else (2, 2)
    mesh = keras_distribution.DeviceMesh(shape, ["batch", "model"], devices)
    layouts = keras_distribution.LayoutMap(mesh)
    layouts[".*up/(kernel|_kernel)"] = (None, "model")
    layouts[".*down/(kernel|_kernel)"] = ("model", None)
    layouts[".*embed/embeddings"] = (None, "model")
    if kind == "model":  # where Keras cannot predict in any case
        layouts[".*head/kernel"] = (None, "model")
    if kind in backbones:
        layouts = backbones[kind][0].get_layout_map(mesh)
    found = None
    if kind == "data":
        found = keras_distribution.DataParallel(
            devices=devices, auto_shard_dataset=False
        )
    elif kind != "none":
        found = keras_distribution.ModelParallel(
            layout_map=layouts, batch_dim_name="batch", auto_shard_dataset=False
        )
    keras_distribution.set_distribution(found)
    keras.utils.set_random_seed(0)
    # A batch is this process's part of it where the batch is cut over processes.
    is_part = kind not in ("none", "across")
    part = slice(8 * index, 8 * index + 8) if is_part else slice(None)
    batch = 8 if is_part else 16
# Keras's `initialize` seeds what it was not told: the weights come from NumPy.
def fill(variables, seed):
    values = np.random.default_rng(seed)
    for variable in variables:
        value = 0.5 * values.standard_normal(variable.shape)
        distribution.assign(variable, value.astype("float32"))
def network(dtype=None):
    layers = [
        keras.layers.Embedding(16, 8, name="embed"),
        keras.layers.Dense(8, activation="tanh", name="up", dtype=dtype),
        keras.layers.Dense(8, name="down", dtype=dtype),
        keras.layers.GlobalAveragePooling1D(),
        keras.layers.Dense(4, name="head"),
    ]
    model = keras.Sequential([keras.Input((3,), dtype="int32"), *layers])
    fill([v for v in model.variables if "float" in v.dtype], 1)
    values = np.random.default_rng(1)
    for variable in model.variables:
        if "int8" in variable.dtype:
            value = values.integers(-90, 90, variable.shape)
            distribution.assign(variable, value.astype("int8"))
        elif "scale" in variable.path:
            distribution.assign(variable, np.full(variable.shape, 80, "float32"))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model
def factors(model):
    return [factor for layer in model.layers if hasattr(layer, "lora")
            for factor in layer.lora.named_factors().values()]
def adapt(model, **options):
    keras_lora.apply_lora(
        model, rank=2, target=["embed", "up", "down"], also_train=["head"], **options
    )
    fill(factors(model), 2)
    return model
def fit(model, x=ids, **options):
    return model.fit(
        x[part], targets[part], batch_size=batch, epochs=2, verbose=0,
        shuffle=False, **options
    ).history["loss"]
def weights(model):
    return [distribution.fetch(v).tolist() for v in model.weights]
def is_same(model, values):
    now = weights(model)
    return len(now) == len(values) and all(map(np.array_equal, now, values))
def placed(x):
    # An array that all processes have, on all devices.
    x = np.asarray(x, "int32")
    if kind == "none":
        return keras.ops.convert_to_tensor(x)
    layout = keras_distribution.TensorLayout([None] * x.ndim, mesh)
    return jax.device_put(x, layout.backend_layout)
def outputs(model):
    return distribution.fetch(model(placed(ids))).tolist()
def tensors(adapter):
    return [adapter.tensors[key].tolist() for key in sorted(adapter.tensors)]
def values_of(*tensors):
    return [distribution.fetch(tensor).tolist() for tensor in tensors]
def bytes_held():
    # What a device of this process holds: each buffer once.
    gc.collect()
    device = jax.local_devices()[0]
    shards = [s.data for x in jax.live_arrays() for s in x.addressable_shards
              if s.device == device]
    return sum({x.unsafe_buffer_pointer(): x.nbytes for x in shards}.values())
def share(variables):
    return sum(v.value.addressable_shards[0].data.nbytes for v in variables)
results = {}
processes.MEETING_SECONDS = 200  # of a machine that does much else
"""

CALLS = """
def files():
    places = [os.path.join(folder, name) for name in ("saved", "by_epoch")]
    model, found = adapt(network()), {}
    checkpoint = keras_lora.AdapterCheckpoint(places[1])
    found["losses"] = fit(model, callbacks=[checkpoint])
    keras_lora.save_adapter(model, places[0])
    for place in places:
        found[f"file {place == places[0]}"] = tensors(keras_lora.Adapter.read(place))
    trained = weights(model)
    found["trained"], found["outputs"] = trained, outputs(model)
    for variable in model.trainable_variables:
        variable.assign(0 * variable)
    keras_lora.load_adapter(model, places[0])
    assert is_same(model, trained)
    with keras_lora.disabled(model):
        found["disabled"] = outputs(model)
    kernels = [model.get_layer(name).lora_layer().frozen_kernel
               for name in ("embed", "up", "down")]
    with keras_lora.merged(model):
        found["merged"] = outputs(model)
        if kind in ("none", "across"):  # where Keras can predict
            predicted = model.predict(ids, batch_size=16, verbose=0)
            np.testing.assert_allclose(predicted, found["merged"], atol=1e-5)
    before = bytes_held()
    with keras_lora.merged(model):
        assert bytes_held() - before == share(kernels)  # no whole kernel anywhere
    assert is_same(model, trained)
    other = network()
    keras_lora.load_adapter(other, places[1])
    found["loaded"] = outputs(other)
    keras_lora.remove_lora(other)
    found["removed"] = weights(other)
    if kind in ("none", "across"):
        artifact = os.path.join(folder, "artifact")
        keras_lora.export(model, artifact)
        served = tf.saved_model.load(artifact)
        found["exported"] = served.serve(ids.astype("int32")).numpy().tolist()
        assert is_same(model, trained)
    keras_lora.merge_lora(model)
    found["merged for good"] = weights(model)
    extracted = keras_lora.extract_adapter(other, model, rank=2)
    found["extracted"] = max(extracted.errors.values())
    keras_lora.load_adapter(other, extracted)
    found["again"] = outputs(other)
    return found
def starts():
    found = {}
    others = ("pissa", "olora", "orthogonal") if kind in ("none", "across") else ()
    for method in ("eva", *others):
        keras.utils.set_random_seed(3)
        model = network()
        keras_lora.apply_lora(model, rank=2, target=["up", "down"])
        before, data = outputs(model), ids[part] if method == "eva" else None
        keras_lora.initialize_lora(model, method, data)
        np.testing.assert_allclose(outputs(model), before, atol=1e-5)
        lora = model.get_layer("down").lora
        a = distribution.fetch(lora.a)
        if method == "orthogonal":
            found["angles"] = (a.T @ a).tolist()[0][1]
        else:  # which leave the sign of each vector open
            product = lora.a @ lora.b if method != "eva" else keras.ops.abs(lora.a)
            found[method] = values_of(product)
    return found
def methods():
    python_random.seed(5)
    model = adapt(network(), use_dora=True, dropout=0.3)
    model.compile(keras_lora.LoRAPlus(keras.optimizers.Adam(0.01), 4.0), "mse")
    found = {"losses of DoRA": fit(model)}
    keras_lora.save_adapter(model, os.path.join(folder, "dora"))
    found["DoRA"] = outputs(model)
    other = network()
    keras_lora.load_adapter(other, os.path.join(folder, "dora"))
    keras_lora.merge_lora(other)
    found["DoRA merged"] = outputs(other)
    for way in ("dequantize", "requantize"):
        model = network("int8_from_float32")
        keras_lora.apply_lora(model, rank=2, target=["up", "down"])
        fill(factors(model), 2)
        if way == "dequantize":
            found["losses of int8"] = fit(model)
        found[f"int8 {way}"] = outputs(model)
        keras_lora.merge_lora(model, quantized=way)
        found[f"merged int8 {way}"] = outputs(model)
        if kind == "across" and way == "dequantize":
            kernel = model.get_layer("up").kernel
            assert share([kernel]) == 4 * 8 * 8 / 4, kernel.value.sharding
    return found
def banks():
    found, names = {}, ("saved", "dora", "by_epoch")
    places = [os.path.join(folder, name) for name in names]
    bank = keras_lora.AdapterBank(network(), {"one": places[0], "two": places[1]}, 3)
    if kind == "across":
        stacks = {path: layer.lora.stacks for path, layer in bank.hosts.layers.items()}
        assert share([stacks["up"].b]) == 4 * 2 * 2 * bank.id_table.slot_count
        assert share([stacks["down"].a]) == 4 * 2 * 2 * bank.id_table.slot_count
        assert share([stacks["up"].gain]) == 4 * 2 * bank.id_table.slot_count
    names = ["one", None, "two", "one"] * 4
    def called(names):
        inputs = {"inputs": placed(ids), "adapter": placed(bank.ids(names))}
        return distribution.fetch(bank(inputs)).tolist()
    found["called"] = called(names)
    if kind in ("none", "across"):
        inputs = {"inputs": ids, "adapter": bank.ids(names)}
        predicted = bank.predict(inputs, batch_size=16, verbose=0)
        np.testing.assert_allclose(predicted, found["called"], atol=1e-5)
    bank.add("three", places[2])
    found["added"] = called(["three"] * 16)
    bank.remove("two")
    bank.compile(keras.optimizers.SGD(0.01), "mse")
    rows = bank.ids(["one", "three"] * 8)[part]
    found["losses of a bank"] = bank.fit(
        {"inputs": ids[part], "adapter": rows}, targets[part], batch_size=batch,
        epochs=2, verbose=0, shuffle=False,
    ).history["loss"]
    found["bank trained"] = tensors(bank.adapter("one"))
    bank.activate("one")
    found["active"] = outputs(bank.model)
    bank.activate(None)
    with bank.rows(names[:2] * 8):
        found["rows"] = outputs(bank.model)
    bank.release()
    found["released"] = outputs(bank.model)
    return found
for now in ("none", "data", "model", "across"):
    spread(now)
    results[now] = {}
    for calls in (files, starts, methods, banks):
        if index == 0 if now == "none" else calls in (files, starts) or now == "across":
            results[now] |= calls()
    distribution.REPLICATED_BYTES = 0  # then values come part by part
"""

HUB = """
def backbone(name):
    backbone_class, arguments = backbones[name]
    sizes = dict(vocabulary_size=16, num_layers=1, num_query_heads=4,
        num_key_value_heads=4, hidden_dim=16, intermediate_dim=32)
    model = backbone_class(**sizes, **arguments)
    fill(model.weights, 1)
    model.compile("sgd", "mse")
    return model
def hub(name):
    found, model = {}, backbone(name)
    keras_lora.apply_lora(model, rank=2, target="all")
    loras = [site.lora for site in adapted_sites(model)]
    fill([v for lora in loras for v in (lora.a, lora.b)], 2)
    x = {"token_ids": ids.astype("int32"), "padding_mask": np.ones((16, 3), "int32")}
    def outputs(model):
        return values_of(model({key: placed(value) for key, value in x.items()}))
    own = {key: value[part] for key, value in x.items()}
    rows = np.random.default_rng(3).standard_normal((16, 3, 16), "float32")[part]
    found["losses"] = model.fit(
        own, rows, batch_size=batch, epochs=2, verbose=0, shuffle=False
    ).history["loss"]
    keras_lora.save_adapter(model, folder)
    found["file"] = tensors(keras_lora.Adapter.read(folder))
    kernels = [site.frozen_kernel for site in adapted_sites(model)]
    with keras_lora.merged(model):
        pass
    before = bytes_held()
    with keras_lora.merged(model):
        assert bytes_held() - before == share(kernels)
    other = backbone(name)
    keras_lora.load_adapter(other, folder)
    keras_lora.merge_lora(other)
    found["merged"] = outputs(other)
    return found
for name in backbones:
    for now in ("none", name):
        spread(now)
        if now != "none" or index == 0:
            results[f"{name} {now}"] = hub(name)
"""

ERRORS = """
processes.MEETING_SECONDS = 2
def caught(call, *arguments):
    try:
        call(*arguments)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["nothing", ""]
def errors():
    own, shared = os.path.join(folder, f"own {index}"), os.path.join(folder, "shared")
    found, model = {}, adapt(network())
    before = weights(model)
    keras_lora.save_adapter(model, shared)
    adapter = keras_lora.Adapter.read(shared)
    plain = network()
    bank = keras_lora.AdapterBank(network(), {"one": shared}, capacity=2)
    def said(call, *arguments):
        result = caught(call, *arguments)
        assert is_same(model, before)
        assert type(model.layers[0]).__name__ == "LoRAEmbedding"
        assert type(plain.layers[1]) is keras.layers.Dense
        assert bank.names == ["one"]
        return result
    if index == 0:
        adapter.save(own)
    found["seen by one"] = said(keras_lora.load_adapter, model, own)
    found["added by one"] = said(bank.add, "two", own)
    if index == 1:
        for value in adapter.tensors.values():
            value += 1
        adapter.save(own)
    found["other files"] = said(keras_lora.load_adapter, model, own)
    found["others added"] = said(bank.add, "two", own)
    fresh = network()
    keras_lora.apply_lora(fresh, rank=2, target=["up"])
    start = weights(fresh)
    own_start = lambda layer: (np.full((8, 2), index + 1.0), np.zeros((2, 8)))
    found["other starts"] = said(keras_lora.initialize_lora, fresh, own_start)
    batches = [ids] * (1 + index)
    found["more batches"] = said(keras_lora.initialize_lora, fresh, "eva", batches)
    rows = ids + index
    found["other rows"] = said(keras_lora.initialize_lora, fresh, "eva", rows)
    assert is_same(fresh, start)
    full = os.path.join(folder, "full")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if index == 0:  # as a disk that is full
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    found["full"] = said(keras_lora.save_adapter, model, full)
    found["full for an artifact"] = said(keras_lora.export, model, full)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not os.path.exists(full) or not os.listdir(full)
    def disabled():
        with keras_lora.disabled(model):
            pass
    def merged():
        with keras_lora.merged(model):
            pass
    for name, call, alone in (
        ("save", lambda: keras_lora.save_adapter(model, shared), 0),
        ("merge", lambda: keras_lora.merge_lora(model), 1),
        ("apply", lambda: keras_lora.apply_lora(plain, rank=2), 0),
        ("disabled", disabled, 1),
        ("merged", merged, 0),
        ("export", lambda: keras_lora.export(model, full), 1),
        ("activate", lambda: bank.activate("one"), 0),
        ("make a bank", lambda: keras_lora.AdapterBank(plain, {"one": shared}), 1),
    ):
        mark = os.path.join(folder, name)
        if index == alone:
            found[f"alone: {name}"] = caught(call)
            keras_lora.summary(model)  # waits for nobody
            open(mark, "w").close()
        while not os.path.exists(mark):
            time.sleep(0.05)
    said(lambda: None)
    keras_lora.save_adapter(model, shared)  # and all goes on where they do it together
    keras_lora.load_adapter(model, shared)
    return found
spread("across")
results["errors"] = errors()
written = os.path.join(top, f"{index}.json")  # a pipe would not hold it
with open(written, "w") as file:
    json.dump(results, file)
print(json.dumps(written))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What two processes find, and what one of them finds alone."""
    folder = tmp_path_factory.mktemp("processes")
    script = script_of_the_guide("jax")
    _, calls = script.split("model = keras.Sequential", 1)
    alone = f"""
spread("none")
together, places = loss, os.getcwd()
os.makedirs(f"{{places}}/alone {{index}}")
os.chdir(f"{{places}}/alone {{index}}")
model = keras.Sequential{calls}
os.chdir(places)
results["script"] = [together, loss]
"""
    program = f"import os\nos.chdir({str(folder)!r})\n{script}{BEGIN}{alone}"
    (port,) = free_ports(1)
    settings = {**FLAGS, "ADDRESS": f"127.0.0.1:{port}", "PROCESSES": "2"}
    started = [
        start(
            program + CALLS + HUB + ERRORS,
            str(folder),
            **settings,
            PROCESS=str(index),
        )
        for index in range(2)
    ]
    written = finish_all(started, 600)
    return [json.loads(Path(path).read_text()) for path in written]


def assert_close(several, one):
    for found in several:
        assert found.keys() <= one.keys() and len(found) > 2
        for key, value in found.items():
            for own, expected in zip(*map(as_list, (value, one[key])), strict=True):
                np.testing.assert_allclose(own, expected, atol=5e-6, err_msg=key)


def as_list(value):
    return value if isinstance(value, list) else [value]


@pytest.mark.parametrize("kind", KINDS)
def test_calls_give_what_one_process_gives(kind, results):
    assert_close([found[kind] for found in results], results[0]["none"])


@pytest.mark.parametrize("name", MAPS)
def test_layout_maps_of_keras_hub_give_what_one_process_gives(name, results):
    several = [found[f"{name} {name}"] for found in results]
    assert_close(several, results[0][f"{name} none"])


def test_what_fails_on_one_process_fails_on_all(results):
    first, second = (found["errors"] for found in results)
    for name in ("seen by one", "added by one"):
        kind_of_error, text = second[name]
        assert kind_of_error == "FileNotFoundError"
        assert first[name][0] == "OSError"
        assert "Process 1" in first[name][1] and text in first[name][1]
    for name in ("full", "full for an artifact"):
        assert first[name][0] == second[name][0] == "OSError"
        assert "Process 0" in second[name][1]
    for found in (first, second):
        for name in ("other files", "others added"):
            assert found[name][0] == "ValueError"
            assert "different files" in found[name][1]
        assert "different values for A and B" in found["other starts"][1]
        assert "different numbers of batches" in found["more batches"][1]
        assert "different rows" in found["other rows"][1]


def test_a_process_that_calls_alone_gets_an_error(results):
    found = {**results[0]["errors"], **results[1]["errors"]}
    alone = [value for name, value in found.items() if name.startswith("alone")]
    assert len(alone) == 8
    for kind_of_error, text in alone:
        assert kind_of_error == "RuntimeError"
        assert "all of them have to make each call" in text


def test_the_script_of_the_guide_gives_what_one_process_gives(results):
    for found in results:
        several, one = found["script"]
        np.testing.assert_allclose(several, one, atol=1e-6)
