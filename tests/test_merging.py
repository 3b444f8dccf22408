"""merge_lora, remove_lora, merged and disabled on whole models."""

import contextlib
import itertools

import keras
import numpy as np
import pytest
from layer_cases import fill, to_numpy
from models import MODELS, sequential, trained, x, y
from shared import assert_same_state, optimizer_state, predict, state

import keras_lora
from keras_lora import LoRADense
from keras_lora.models import merge
from keras_lora.models.sites import adapted_sites

over_models = pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)


@over_models
def test_merge_lora_leaves_plain_layers_and_the_predictions(build):
    model = trained(build)
    before = predict(model)
    adapted = adapted_sites(model)
    keras_lora.merge_lora(model)
    np.testing.assert_array_equal(predict(model), before)
    for layer in model._flatten_layers():
        assert type(layer).__module__.startswith("keras.") or layer is model
    for layer in adapted:
        assert type(layer) is keras.layers.Dense
        assert not hasattr(layer, "lora")
        plain = keras.layers.Dense(layer.units, use_bias=layer.use_bias)
        plain.build(layer._build_shapes_dict["input_shape"])
        assert [w.name for w in layer.weights] == [w.name for w in plain.weights]
        assert layer.get_config().keys() == plain.get_config().keys()


def test_large_kernels_are_merged_as_small_ones_are(monkeypatch):
    monkeypatch.setattr(merge, "SMALL", 0)
    model = trained(sequential)
    layer = adapted_sites(model)[0]
    kernel, a, b = (
        to_numpy(v).astype("float64")
        for v in (layer.kernel, layer.lora.a, layer.lora.b)
    )
    merged = kernel + layer.lora.scaling * a @ b
    keras_lora.merge_lora(model)
    np.testing.assert_allclose(to_numpy(layer.kernel), merged, rtol=1e-5, atol=1e-6)


@over_models
def test_merged_model_trains_its_kernels(build):
    model = trained(build)
    layer = adapted_sites(model)[0]
    keras_lora.merge_lora(model)
    kernel = to_numpy(layer.kernel)
    model.fit(x(), y(), epochs=1, verbose=0)
    assert np.abs(to_numpy(layer.kernel) - kernel).max() > 0
    assert {id(w) for w in layer.weights} == {id(w) for w in layer.trainable_weights}


@over_models
def test_merged_model_can_be_saved_as_a_plain_one(build, tmp_path):
    model = trained(build)
    if not isinstance(model, (keras.Sequential, keras.src.models.Functional)):
        pytest.skip("its own configuration makes LoRA layers")
    keras_lora.merge_lora(model)
    model.save(tmp_path / "plain.keras")
    loaded = keras.models.load_model(tmp_path / "plain.keras")
    np.testing.assert_array_equal(predict(loaded), predict(model))
    assert b"keras_lora" not in (tmp_path / "plain.keras").read_bytes()


@over_models
def test_remove_lora_gives_the_base_model(build):
    model = trained(build)
    with keras_lora.disabled(model):
        base = predict(model)
    assert np.abs(base - predict(model)).max() > 1e-3
    kernels = [to_numpy(layer.kernel) for layer in adapted_sites(model)]
    adapted = adapted_sites(model)
    keras_lora.remove_lora(model)
    np.testing.assert_array_equal(predict(model), base)
    for layer, kernel in zip(adapted, kernels, strict=True):
        np.testing.assert_array_equal(to_numpy(layer.kernel), kernel)


@over_models
def test_contexts_leave_the_model_to_the_bit(build):
    model = trained(build)
    before, outputs, optimizer = state(model), predict(model), optimizer_state(model)
    eager = to_numpy(model(x()))
    for _ in range(20):
        with keras_lora.merged(model):
            pass
        with keras_lora.disabled(model):
            pass
    with keras_lora.merged(model):
        np.testing.assert_array_equal(predict(model), outputs)
        np.testing.assert_array_equal(to_numpy(model(x())), eager)
    with pytest.raises(KeyError), keras_lora.disabled(model):
        raise KeyError
    np.testing.assert_array_equal(predict(model), outputs)
    assert_same_state(before, state(model))
    for old, new in zip(optimizer, optimizer_state(model), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_compiled_predict_sees_the_contexts():
    model = trained(sequential)
    adapted = predict(model)
    with keras_lora.disabled(model):
        base = predict(model)
    assert np.abs(base - adapted).max() > 1e-3
    np.testing.assert_array_equal(predict(model), adapted)
    keras_lora.remove_lora(model)
    np.testing.assert_array_equal(predict(model), base)


def test_merged_traces_its_own_functions_and_gives_the_others_back():
    model = trained(sequential)
    predict(model)
    function = model.predict_function
    with keras_lora.merged(model):
        predict(model)  # W + delta is formed no more: what was traced would form it
        assert model.predict_function is not function
    assert model.predict_function is function


def test_nothing_that_was_traced_inside_of_merged_outlives_it():
    """Its kernels stand still."""
    model = trained(sequential)
    with keras_lora.merged(model):
        before = predict(model)
    for seed, layer in enumerate(adapted_sites(model)):
        fill(layer.lora.b, seed + 7, 0.5)
    outputs = predict(model)
    assert np.abs(outputs - before).max() > 0.01
    np.testing.assert_allclose(outputs, to_numpy(model(x())), rtol=0, atol=1e-5)


def test_kernel_survives_a_hundred_merges():
    model = trained(sequential)
    kernel = to_numpy(adapted_sites(model)[0].kernel)
    for _ in range(100):
        with keras_lora.merged(model):
            pass
    np.testing.assert_array_equal(to_numpy(adapted_sites(model)[0].kernel), kernel)


def test_fitting_inside_of_a_context_is_refused():
    """Adam's moments would move A and B, although their gradients are zero."""
    model = trained(sequential)
    before = state(model)
    contexts = [keras_lora.merged, keras_lora.disabled]
    for opened in (contexts[:1], contexts[1:], contexts):
        with contextlib.ExitStack() as inside:
            for context in opened:
                inside.enter_context(context(model))
            for train in (model.fit, model.train_on_batch):
                with pytest.raises(ValueError, match=f"{context.__name__}.*Leave"):
                    train(x(), y())
    assert_same_state(before, state(model))
    model.fit(x(), y(), verbose=0)


def test_contexts_need_not_nest_and_begin_where_they_are_entered():
    model = trained(sequential)
    early = keras_lora.merged(model)
    first, second = keras_lora.disabled(model), keras_lora.disabled(model)
    fill(adapted_sites(model)[0].lora.b, 3)
    expected = predict(model)
    with early:
        np.testing.assert_allclose(predict(model), expected, atol=1e-5)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    with pytest.raises(ValueError, match="inside `disabled"):
        model.train_on_batch(x(), y())
    second.__exit__(None, None, None)
    model.train_on_batch(x(), y())
    keras_lora.remove_lora(model)
    with pytest.raises(ValueError, match="no LoRA layer"), keras_lora.merged(model):
        pass
    late = keras_lora.disabled
    with pytest.raises(ValueError, match="no LoRA layer"), late(model):
        pass


def test_disabled_is_the_base_model_while_training_too():
    model = trained(sequential)
    layer = adapted_sites(model)[0]
    plain = keras.layers.Dense(8, activation="relu")
    plain.build((None, 6))
    plain.set_weights([to_numpy(layer.kernel), to_numpy(layer.bias)])
    with keras_lora.disabled(model):
        outputs = to_numpy(layer(x(), training=True))
    np.testing.assert_array_equal(outputs, to_numpy(plain(x())))


@pytest.mark.parametrize("operation", ["merge_lora", "merged", "export"])
def test_non_finite_adapter_is_refused(operation, tmp_path):
    model = trained(sequential)
    last = adapted_sites(model)[-1]
    arguments = []
    if operation == "export":  # in a format that every backend writes
        arguments = [tmp_path / "artifact.onnx", "onnx"]
    for factor, bad in itertools.product("ab", (np.nan, np.inf)):
        values = to_numpy(getattr(last.lora, factor))
        wrong = np.array(values)
        wrong[0, 0] = bad
        getattr(last.lora, factor).assign(wrong)
        before = state(model)
        with pytest.raises(ValueError, match=f"{factor.upper()} of layer 'last'"):
            getattr(keras_lora, operation)(model, *arguments)
        assert_same_state(before, state(model))
        assert len(adapted_sites(model)) == 2
        assert not list(tmp_path.iterdir())
        getattr(last.lora, factor).assign(values)


def test_a_sum_that_the_kernels_dtype_cannot_hold_is_refused():
    layer = LoRADense(2, rank=1, dtype="float16")
    layer.build((None, 3))
    layer.kernel.assign(np.full((3, 2), 6e4))
    layer.lora.a.assign(np.full((3, 1), 1e2))
    layer.lora.b.assign(np.full((1, 2), 1e2))
    with pytest.raises(ValueError, match="the merged kernel of layer"):
        keras_lora.merge_lora(layer)
    np.testing.assert_array_equal(to_numpy(layer.kernel), np.float16(6e4))


@pytest.mark.parametrize("operation", ["merge_lora", "remove_lora", "merged"])
def test_structure_does_not_change_inside_a_context(operation):
    model = trained(sequential)
    with keras_lora.merged(model), pytest.raises(ValueError, match="Leave that"):
        getattr(keras_lora, operation)(model)
    assert len(adapted_sites(model)) == 2


@pytest.mark.parametrize(
    "operation", ["merge_lora", "remove_lora", "merged", "disabled"]
)
def test_model_without_adapters_is_an_error(operation):
    plain = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="holds no LoRA layer"):
        getattr(keras_lora, operation)(plain)


def test_unbuilt_layer_is_an_error():
    model = keras.Sequential([keras_lora.LoRADense(3)])
    with pytest.raises(ValueError, match="not built yet"):
        keras_lora.merge_lora(model)


def test_quantize_works_once_merged():
    model = trained(sequential)
    layer = adapted_sites(model)[0]
    with pytest.raises(ValueError, match="over a kernel in 'float8'"):
        layer.quantize("float8")
    before = predict(model)
    keras_lora.merge_lora(model)
    layer.quantize("int8")
    assert np.abs(predict(model) - before).max() < 0.5
