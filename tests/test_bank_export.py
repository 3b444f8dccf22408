"""One artifact of a bank, in processes that know nothing of keras_lora."""

import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops
from layer_cases import fill, to_numpy

import keras_lora
from keras_lora import AdapterBank
from keras_lora.files.save import adapter_of

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="writes SavedModels"
)
ROWS = ["french", None, "de/ut sch", "de/ut sch", "french"]


def text_model():
    """Two inputs by name, attention, an embedding, a layer over (batch * time)."""
    ids = keras.Input((4,), dtype="int32", name="ids")
    scale = keras.Input((4, 1), name="scale")
    hidden = keras.layers.Embedding(9, 8, name="words")(ids) * scale
    attention = keras.layers.MultiHeadAttention(2, 4, name="attention")
    hidden = hidden + attention(hidden, hidden)
    flat = keras.layers.Dense(6, activation="tanh", name="up")(
        ops.reshape(hidden, (-1, 8))
    )
    hidden = keras.layers.Dense(5, name="down")(ops.reshape(flat, (-1, 24)))
    outputs = keras.layers.Dense(3, name="head")(hidden)
    return keras.Model({"ids": ids, "scale": scale}, outputs)


def inputs():
    random = np.random.default_rng(0)
    ids = random.integers(0, 9, (len(ROWS), 4), "int32")
    scale = random.uniform(0.5, 2, (len(ROWS), 4, 1)).astype("float32")
    return {"ids": ids, "scale": scale}


def tuned(model, seed, data, **options):
    """An adapter as after training, and what the model gives with it, merged."""
    report = keras_lora.apply_lora(model, **options)
    for place, row in enumerate(report):
        for name, factor in row.layer.lora.named_factors().items():
            more = np.random.default_rng(9 * seed + place).normal(0, 0.2, factor.shape)
            if name != "a" or row.path == "words":
                factor.assign(factor + more)
    for variable in model.trainable_variables:
        if variable.name in ("bias", "kernel"):
            fill(variable, seed, 0.5)
    adapter, found = adapter_of(model), to_numpy(model(data))
    keras_lora.remove_lora(model)
    return adapter, found


ADAPTERS = {
    "french": {"rank": 2, "alpha": 5, "also_train": ["head"]},
    "de/ut sch": {"rank": 3, "use_dora": True, "target": ["query", "up", "down"]},
    "new": {"rank": 1, "target": ["words", "value", "up"], "bias": "lora_only"},
}

PROGRAM = """
import json, os, sys
import numpy as np
import tensorflow as tf
path, arrays = sys.argv[1:]
data = dict(np.load(arrays))
served = tf.saved_model.load(path)
inputs = {"ids": tf.constant(data["ids"]), "scale": tf.constant(data["scale"])}
def serve(names, count=5):
    rows = {key: value[:count] for key, value in inputs.items()}
    return served.serve(rows, tf.constant(names))
names = [b"french", b"", b"de/ut sch", b"de/ut sch", b"french"]
found = {"serve": serve(names).numpy()}
found["one"] = serve(names[:1], 1).numpy()
found["none"] = serve(tf.zeros((0,), tf.string), 0).numpy()
default = served.signatures["serving_default"]
result = default(adapter=tf.constant(names), **inputs)
found["default"] = result["output_0"].numpy()
errors = []
for wrong in ([b"spanish"] + names[1:], [b"French"] * 5):
    try:
        serve(wrong)
    except tf.errors.InvalidArgumentError as error:
        errors.append(str(error))
swap = served.signatures["swap"]
new = {key[4:]: tf.constant(data[key]) for key in data if key.startswith("new/")}
for wrong in (b"", b"spanish"):
    try:
        swap(**{**new, "adapter": tf.constant(wrong)})
    except tf.errors.InvalidArgumentError as error:
        errors.append(str(error))
swap(**{**new, "adapter": tf.constant(b"french")})
found["swapped"] = serve(names).numpy()
np.savez(arrays, **found)
modules = [name for name in sys.modules if name.split(".")[0] == "keras_lora"]
print(json.dumps({"errors": errors, "modules": modules}))
"""


@pytest.mark.slow
def test_plain_tensorflow_serves_each_row_with_its_adapter(tmp_path):
    model, data = text_model(), inputs()
    expected, adapters = {None: to_numpy(model(data))}, {}
    for seed, (name, options) in enumerate(ADAPTERS.items()):
        adapters[name], expected[name] = tuned(model, seed, data, **options)
    first = {name: adapters[name] for name in ("de/ut sch", "french")}
    bank = AdapterBank(
        model, {**first, "new": adapters["new"]}, capacity=50, max_rank=4
    )
    bank.remove("new")  # it has made room for itself
    bank.export(tmp_path / "served")
    swap = bank.swap_inputs("french", adapters["new"])
    swap = {f"new/{name}": ops.convert_to_numpy(x) for name, x in swap.items()}
    swap.pop("new/adapter")
    np.savez(tmp_path / "arrays.npz", **data, **swap)

    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path / "served", tmp_path / "arrays.npz"],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["modules"] == []
    assert len(said["errors"]) == 4
    assert "There is no adapter" in said["errors"][0]
    assert "spanish" in said["errors"][0]
    assert "french" in said["errors"][0]
    found = dict(np.load(tmp_path / "arrays.npz"))
    wanted = np.stack([expected[name][row] for row, name in enumerate(ROWS)])
    scale = np.abs(wanted).max()
    for name in ("serve", "default"):
        np.testing.assert_allclose(found[name], wanted, rtol=0, atol=1e-5 * scale)
    np.testing.assert_allclose(found["one"], wanted[:1], rtol=0, atol=1e-5 * scale)
    assert found["none"].shape == (0, 3)
    wanted[[0, 4]] = expected["new"][[0, 4]]
    np.testing.assert_allclose(found["swapped"], wanted, rtol=0, atol=1e-5 * scale)
    unmoved = [1, 2, 3]
    np.testing.assert_array_equal(found["swapped"][unmoved], found["serve"][unmoved])

    # The live bank is as before, and the weights stand in the artifact once.
    live = bank({"inputs": data, "adapter": bank.ids(ROWS)})
    np.testing.assert_allclose(to_numpy(live)[1:4], wanted[1:4], atol=1e-5 * scale)
    folder = tmp_path / "served" / "variables"
    size = sum(file.stat().st_size for file in folder.glob("*.data-*"))
    layers = bank.hosts.layers.values()
    stacks = [x for layer in layers for x in layer.lora.stacks.by_name().values()]
    factors = sum(4 * 3 * np.prod(stack.shape[1:]) for stack in stacks)
    base = 4 * sum(np.prod(weight.shape) for weight in model.weights)
    assert 0 <= size - factors - base < 8000


def test_export_replaces_its_own_artifacts_alone(tmp_path):
    model = text_model()
    adapter, _ = tuned(model, 0, inputs(), rank=1)
    bank = AdapterBank(model, {"a": adapter})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("")
    with pytest.raises(FileExistsError):
        bank.export(tmp_path / "mine")
    with pytest.raises(ValueError, match="format"):
        bank.export(tmp_path / "served", format="unknown")
    assert os.listdir(tmp_path) == ["mine"]


@pytest.mark.slow  # and what CI alone installs
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_onnx_takes_ids(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("tf2onnx")
    model, data = text_model(), inputs()
    adapters, expected = {}, {None: to_numpy(model(data))}
    for seed, (name, options) in enumerate(ADAPTERS.items()):
        adapters[name], expected[name] = tuned(model, seed, data, **options)
    bank = AdapterBank(model, adapters)
    bank.remove("new")
    bank.export(tmp_path / "bank.onnx", format="onnx")
    session = onnxruntime.InferenceSession(tmp_path / "bank.onnx")
    names = ["french", None, "de/ut sch", None, "french"]
    (found,) = session.run(None, {**data, "adapter": bank.ids(names)})
    wanted = np.stack([expected[name][row] for row, name in enumerate(names)])
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    wrong = np.array([-1, 3, 99, 0, 1], "int32")
    (found,) = session.run(None, {**data, "adapter": wrong})
    assert np.isnan(found).all(axis=1).tolist() == [True, True, True, False, False]


@pytest.mark.slow  # and what CI alone installs
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize`")
def test_onnx_of_a_bank_over_integers(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("tf2onnx")
    inputs = keras.Input((6,))
    model = keras.Model(inputs, keras.layers.Dense(5, name="host")(inputs))
    model.quantize("int4")
    x = np.random.default_rng(0).standard_normal((4, 6)).astype("float32")
    base = to_numpy(model(x))
    bank = AdapterBank(model, capacity=2, max_rank=2, target=["host"])
    bank.export(tmp_path / "bank.onnx", format="onnx")
    session = onnxruntime.InferenceSession(tmp_path / "bank.onnx")
    ids = np.asarray(bank.ids([None] * 4))
    data = {
        spec.name: ids if spec.name == "adapter" else x for spec in session.get_inputs()
    }
    (found,) = session.run(None, data)
    np.testing.assert_allclose(found, base, rtol=0, atol=1e-5 * np.abs(base).max())
