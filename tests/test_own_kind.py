"""A kind of layer from outside: docs/own_layers.md as it stands gets everything."""

import functools
import re
from pathlib import Path

import keras
import numpy as np
import pytest
from layer_cases import fill, to_numpy

import keras_lora
from keras_lora.layers import kinds

PAGE = Path(__file__).parents[1] / "docs" / "own_layers.md"


@functools.cache
def page():
    """The page's names, after its code has run once."""
    names = {"__name__": "own_layers"}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    for code in blocks:
        exec(code, names)
        if "LoRAMixedDense" in names:
            return names


@pytest.fixture(autouse=True)
def known():
    kinds.register_lora_layer(page()["LoRAMixedDense"])
    yield


def plain_model():
    inputs = keras.Input((6,))
    hidden = page()["MixedDense"](8, gate=(0.25, 0.75), name="mixed")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(hidden))
    for seed, variable in enumerate(model.weights):
        fill(variable, seed)
    return model


def adapted_model():
    model = plain_model()
    keras_lora.apply_lora(model, rank=2, alpha=3)
    for seed, factor in enumerate((lora(model).a, lora(model).b)):
        fill(factor, seed + 5)
    return model


def lora(model):
    return model.get_layer("mixed").lora


def x():
    return np.random.default_rng(1).standard_normal((4, 6)).astype("float32")


def exact(model):
    """The outputs in float64, from the formula on the page."""
    layer, head = model.get_layer("mixed"), model.get_layer("head")
    experts, a, b, kernel, bias = (
        to_numpy(v).astype("float64")
        for v in (layer.experts, layer.lora.a, layer.lora.b, head.kernel, head.bias)
    )
    experts = experts + 1.5 * np.einsum("ir,reu->eiu", a, b)
    return x() @ np.tensordot(layer.gate, experts, 1) @ kernel + bias


def assert_near(found, expected):
    np.testing.assert_allclose(to_numpy(found), expected, atol=1e-5, rtol=1e-5)


def test_all_linear_means_it_and_the_report_names_it():
    model = plain_model()
    outputs = to_numpy(model(x()))
    report = keras_lora.apply_lora(model, rank=2)
    assert [(row.path, row.kind) for row in report] == [("mixed", "LoRAMixedDense")]
    np.testing.assert_array_equal(to_numpy(model(x())), outputs)
    assert "mixed" in str(keras_lora.summary(model))


@pytest.mark.parametrize("training", [True, False])
def test_both_paths_are_the_formula(training):
    model = adapted_model()
    assert_near(model(x(), training=training), exact(model))


def test_training_leaves_its_kernel():
    model = adapted_model()
    layer = model.get_layer("mixed")
    kernel, a = to_numpy(layer.experts), to_numpy(layer.lora.a)
    model.compile("sgd", "mse", jit_compile=False)
    model.fit(x(), np.ones((4, 3)), epochs=2, verbose=0)
    np.testing.assert_array_equal(to_numpy(layer.experts), kernel)
    assert np.abs(to_numpy(layer.lora.a) - a).max() > 0


def test_merging_and_contexts():
    model = adapted_model()
    expected, kernel = exact(model), to_numpy(model.get_layer("mixed").experts)
    with keras_lora.merged(model):
        assert_near(model(x()), expected)
    with keras_lora.disabled(model):
        base = to_numpy(model(x()))
    assert np.abs(base - expected).max() > 0.1
    keras_lora.merge_lora(model)
    layer = model.get_layer("mixed")
    assert type(layer) is page()["MixedDense"]
    assert_near(model(x()), expected)
    layer.experts.assign(kernel)
    np.testing.assert_array_equal(to_numpy(model(x())), base)


def test_keras_file(tmp_path):
    model = adapted_model()
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(to_numpy(loaded(x())), to_numpy(model(x())))
    assert lora(loaded).alpha == 3


@pytest.mark.parametrize("adapt", [plain_model, adapted_model])
def test_adapter_folder(tmp_path, adapt):
    model = adapted_model()
    keras_lora.save_adapter(model, tmp_path / "adapter")
    tensors = keras_lora.Adapter.read(tmp_path / "adapter").tensors
    a, b = to_numpy(lora(model).a), to_numpy(lora(model).b)
    np.testing.assert_array_equal(tensors["mixed.lora_A.weight"], a.T)
    np.testing.assert_array_equal(tensors["mixed.lora_B.weight"], b.reshape(2, -1).T)
    other = adapt()
    for factor in (lora(other).a, lora(other).b) if lora_of(other) else ():
        factor.assign(np.zeros(factor.shape))
    keras_lora.load_adapter(other, tmp_path / "adapter")
    np.testing.assert_array_equal(to_numpy(other(x())), to_numpy(model(x())))


def lora_of(model):
    return getattr(model.get_layer("mixed"), "lora", None)


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="test_export.py has the others"
)
def test_export(tmp_path):
    import tensorflow as tf

    model = adapted_model()
    keras_lora.export(model, tmp_path / "served")
    artifact = tf.saved_model.load(str(tmp_path / "served"))
    assert_near(artifact.serve(x()), exact(model))
