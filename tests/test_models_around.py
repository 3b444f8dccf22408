"""What contains a changed layer, or shares it, sees the change at its next call."""

import gc
import threading
import time

import keras
import numpy as np
import pytest
from layer_cases import fill, to_numpy

import keras_lora
from keras_lora.keras_internals import compiled

INNER, OUTER, SIBLING = "inner", "outer", "sibling"


def models():
    """A model, one around it with a head, and one beside it that shares a layer."""
    shared = keras.layers.Dense(6, name="shared")
    inputs = keras.Input((6,))
    hidden = keras.layers.Dense(6, name="first")(inputs)
    inner = keras.Model(inputs, keras.layers.Dense(6, name="last")(shared(hidden)))
    outer_inputs = keras.Input((6,))
    head = keras.layers.Dense(2, name="head")
    outer = keras.Model(outer_inputs, head(inner(outer_inputs)))
    sibling_inputs = keras.Input((6,))
    sibling = keras.Model(sibling_inputs, shared(sibling_inputs))
    for seed, variable in enumerate(outer.weights):
        fill(variable, seed, 0.5)
    return {INNER: inner, OUTER: outer, SIBLING: sibling}


def x():
    return np.random.default_rng(1).standard_normal((8, 6)).astype("float32")


def warm(model):
    """Compiled, fitted, evaluated and asked: everything is traced."""
    model.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=False)
    y = np.ones((8, model.output_shape[-1]), "float32")
    model.fit(x(), y, verbose=0)
    model.evaluate(x(), y, verbose=0)
    model.predict(x(), verbose=0)
    return y


def shared_layer(found):
    return found[SIBLING].get_layer("shared")


def train_adapters(model):
    for layer in model.layers:
        if getattr(layer, "lora", None) is not None:
            fill(layer.lora.a, 3, 0.5)
            fill(layer.lora.b, 4, 0.5)


def eager(model):
    return to_numpy(model(x()))


@pytest.mark.parametrize("context", [keras_lora.merged, keras_lora.disabled])
def test_what_holds_the_layers_does_not_train_inside_of_a_context(context):
    found = models()
    keras_lora.apply_lora(found[INNER], rank=2)
    beside = keras.Sequential([keras.Input((6,)), keras.layers.Dense(1)])
    for model in (*found.values(), beside):
        model.compile(keras.optimizers.Adam(0.01), "mse", run_eagerly=True)
    y = {name: np.ones((8, *model.output_shape[1:])) for name, model in found.items()}
    found[OUTER].fit(x(), y[OUTER], verbose=0)
    before = [to_numpy(variable) for variable in found[OUTER].variables]
    with context(found[INNER]):
        for name, model in found.items():
            for train in (model.fit, model.train_on_batch):
                with pytest.raises(ValueError, match=f"{context.__name__}.*Leave"):
                    train(x(), y[name])
        beside.fit(x(), np.ones((8, 1)), verbose=0)
    for old, variable in zip(before, found[OUTER].variables, strict=True):
        np.testing.assert_array_equal(to_numpy(variable), old)
    assert "make_train_function" not in vars(keras.Model)
    for name, model in found.items():
        model.fit(x(), y[name], verbose=0)


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


over_others = pytest.mark.parametrize("which", [OUTER, SIBLING])


@over_others
def test_the_other_models_train_the_adapter_and_not_the_kernel(which):
    found = models()
    y = warm(found[which])
    keras_lora.apply_lora(found[INNER], rank=2, target=["shared", "first"])
    layer = shared_layer(found)
    kernel, b = to_numpy(layer.kernel), to_numpy(layer.lora.b)
    found[which].fit(x(), y, epochs=3, verbose=0)
    np.testing.assert_array_equal(to_numpy(layer.kernel), kernel)
    assert np.abs(to_numpy(layer.lora.b) - b).max() > 0
    assert_close(found[which].predict(x(), verbose=0), eager(found[which]))


@over_others
@pytest.mark.parametrize("operation", [keras_lora.merge_lora, keras_lora.remove_lora])
def test_the_other_models_predict_after_undoing(which, operation):
    found = models()
    keras_lora.apply_lora(found[INNER], rank=2, target=["shared", "first"])
    base = eager(found[which])
    train_adapters(found[INNER])
    tuned = eager(found[which])
    y = warm_keeping(found[which])
    operation(found[INNER])
    expected = base if operation is keras_lora.remove_lora else tuned
    assert_close(found[which].predict(x(), verbose=0), expected)
    kernel = to_numpy(shared_layer(found).kernel)
    found[which].fit(x(), y, verbose=0)  # the plain kernel trains again
    assert np.abs(to_numpy(shared_layer(found).kernel) - kernel).max() > 0


def warm_keeping(model):
    """Everything is traced, and no weight has moved."""
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=False)
    y = np.ones((8, model.output_shape[-1]), "float32")
    model.fit(x(), y, verbose=0)
    model.predict(x(), verbose=0)
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=False)
    model.predict(x(), verbose=0)
    return y


@over_others
def test_a_single_layer_is_adapted_for_all(which):
    found = models()
    y = warm(found[which])
    layer = shared_layer(found)
    kernel = to_numpy(layer.kernel)
    keras_lora.apply_lora(layer, rank=2, target=keras.layers.Dense)
    found[which].fit(x(), y, epochs=2, verbose=0)
    np.testing.assert_array_equal(to_numpy(layer.kernel), kernel)
    assert np.abs(to_numpy(layer.lora.b)).max() > 0


def test_a_warning_says_that_models_that_were_frozen_are_not_seen(monkeypatch):
    found = models()
    monkeypatch.setattr(compiled, "gc", gc)  # which conftest.py has replaced
    monkeypatch.setattr(compiled.WARNED_AT, "count", gc.get_freeze_count())
    gc.freeze()  # as servers do before they fork
    with pytest.warns(UserWarning, match="hides the models .*Compile them again"):
        keras_lora.apply_lora(found[INNER], rank=2, target=["shared"])
    assert gc.get_freeze_count() > 0  # the user's own: it stays
    keras_lora.remove_lora(found[INNER])


@over_others
def test_functions_of_other_names_are_traced_anew_too(which):
    found = models()
    found[which].generate_function = lambda inputs: None  # as KerasHub keeps one
    keras_lora.apply_lora(found[INNER], rank=2, target=["shared"])
    assert found[which].generate_function is None


class Extended(keras.Sequential):
    """A class of models that extends another, as KerasHub's tasks do."""


def test_models_of_every_class_are_seen():
    found = models()
    outer = Extended([keras.Input((6,)), found[INNER]])
    outer.generate_function = lambda inputs: None
    keras_lora.apply_lora(found[INNER], rank=2, target=["shared"])
    assert outer.generate_function is None


def test_a_shared_layer_of_which_nothing_can_train_is_seen():
    """A quantized kernel is none of the variables that `trainable` reaches."""
    shared, inputs = keras.layers.Dense(6, use_bias=False), keras.Input((6,))
    model = keras.Model(inputs, keras.layers.Dense(2)(shared(inputs)))
    beside = keras.Sequential([keras.Input((6,)), shared])
    shared.quantize("int8")
    keras_lora.apply_lora(model, rank=2)
    beside.generate_function = lambda inputs: None
    keras_lora.merge_lora(model, quantized="requantize")
    assert beside.generate_function is None


def test_a_model_that_shares_no_variable_is_left_alone():
    relu = keras.layers.ReLU()
    layers = [keras.layers.Dense(6, name="first"), relu, keras.layers.Dense(2)]
    model = keras.Sequential([keras.Input((6,)), *layers])
    beside = keras.Sequential([keras.Input((6,)), relu, keras.layers.Dense(2)])
    beside.generate_function = function = lambda inputs: None
    keras_lora.apply_lora(model, rank=2)
    assert beside.generate_function is function


def test_loading_reaches_the_model_around(tmp_path):
    found = models()
    keras_lora.apply_lora(found[INNER], rank=2)
    train_adapters(found[INNER])
    tuned = eager(found[OUTER])
    keras_lora.save_adapter(found[INNER], tmp_path / "adapter")
    keras_lora.remove_lora(found[INNER])
    warm_keeping(found[OUTER])
    keras_lora.load_adapter(found[INNER], tmp_path / "adapter")
    assert_close(found[OUTER].predict(x(), verbose=0), tuned)
    for context in (keras_lora.merged, keras_lora.disabled):
        with (
            context(found[INNER]),
            pytest.raises(ValueError, match="Leave that context"),
        ):
            keras_lora.load_adapter(found[INNER], tmp_path / "adapter")


def test_marking_an_inner_model_freezes_it_for_all():
    found = models()
    inner = keras.Sequential([keras.Input((6,)), keras_lora.LoRADense(6, rank=2)])
    outer = keras.Sequential([keras.Input((6,)), inner, keras.layers.Dense(2)])
    found = inner.layers[0]
    y = warm(outer)
    bias = to_numpy(found.bias)
    keras_lora.mark_only_lora_as_trainable(inner)
    outer.fit(x(), y, verbose=0)
    np.testing.assert_array_equal(to_numpy(found.bias), bias)


def traced(model):
    """A user's own function around a model, compiled where the backend compiles."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(lambda inputs: model(inputs, training=False))
    return lambda inputs: model(inputs, training=False)


def test_disabled_is_seen_by_functions_traced_outside_and_inside():
    found = models()
    base = eager(found[OUTER])
    keras_lora.apply_lora(found[INNER], rank=2)
    train_adapters(found[INNER])
    tuned = eager(found[OUTER])
    function = traced(found[OUTER])
    assert_close(to_numpy(function(x())), tuned)
    with keras_lora.disabled(found[INNER]):
        assert_close(to_numpy(function(x())), base)
        inside = traced(found[OUTER])
        assert_close(to_numpy(inside(x())), base)
        with keras_lora.disabled(found[INNER]):
            assert_close(to_numpy(function(x())), base)
        assert_close(to_numpy(function(x())), base)
    assert_close(to_numpy(function(x())), tuned)
    assert_close(to_numpy(inside(x())), tuned)
    with keras_lora.merged(found[INNER]):
        merged_inside = traced(found[OUTER])
        assert_close(to_numpy(merged_inside(x())), tuned)
        with keras_lora.disabled(found[INNER]):
            assert_close(to_numpy(merged_inside(x())), base)
            assert_close(eager(found[OUTER]), base)
        assert_close(to_numpy(merged_inside(x())), tuned)


@pytest.mark.parametrize("operation", [keras_lora.merge_lora, keras_lora.remove_lora])
def test_stale_functions_give_the_right_numbers(operation):
    found = models()
    base = eager(found[OUTER])
    keras_lora.apply_lora(found[INNER], rank=2)
    train_adapters(found[INNER])
    tuned = eager(found[OUTER])
    function = traced(found[OUTER])
    function(x())
    operation(found[INNER])
    expected = base if operation is keras_lora.remove_lora else tuned
    assert_close(to_numpy(function(x())), expected)


def test_another_alpha_is_seen_by_a_compiled_predict():
    model = models()[INNER]
    keras_lora.apply_lora(model, rank=2)
    train_adapters(model)
    model.predict(x(), verbose=0)
    for layer in model.layers[1:3]:
        layer.lora.alpha = 40
        assert layer.lora.scaling == 20
    assert_close(model.predict(x(), verbose=0), eager(model))
    other = models()[INNER]
    keras_lora.apply_lora(other, rank=2, alpha=40)
    train_adapters(other)
    assert_close(model.predict(x(), verbose=0), eager(other))
    with pytest.raises(ValueError, match="alpha=-1"):
        layer.lora.alpha = -1
    assert layer.lora.alpha == 40


def test_what_another_adapted_model_holds_stays_frozen_there():
    found = models()
    shared = shared_layer(found)
    keras_lora.apply_lora(found[SIBLING], rank=2, target=["shared"])
    keras_lora.remove_lora(found[SIBLING])
    for take_off in (keras_lora.remove_lora, keras_lora.merge_lora):
        keras_lora.apply_lora(found[OUTER], rank=2, target=["last"])
        beside = keras.Sequential([shared, keras.layers.Dense(1, name="own")])
        beside.build((None, 6))
        keras_lora.apply_lora(beside, rank=2, target=["own"])
        take_off(found[OUTER])
        assert {v.path.split("/")[-2] for v in beside.trainable_variables} == {"lora"}
        assert shared.trainable is False
        keras_lora.remove_lora(beside)
        assert shared.trainable and len(beside.trainable_variables) == 4


def test_an_inner_model_without_adapters_stays_frozen_in_an_adapted_one():
    found = models()
    keras_lora.apply_lora(found[OUTER], rank=2, target=".*")
    keras_lora.remove_lora(found[INNER])
    names = [variable.path for variable in found[OUTER].trainable_variables]
    assert names == ["head/lora/a", "head/lora/b"]
    keras_lora.remove_lora(found[OUTER])
    assert len(found[OUTER].trainable_variables) == 8


def test_other_threads_build_tuples_while_models_are_looked_for():
    """Python refuses to enlarge a tuple that something else refers to."""
    errors, done, built = [], threading.Event(), threading.Event()
    objects = [[n] for n in range(300_000)]  # looking through these takes a while

    def slowly():
        for n in range(30):
            time.sleep(0.0005)
            yield n

    def build():
        while not done.is_set():
            try:
                tuple(slowly())
            except SystemError as error:
                errors.append(error)
            built.set()

    thread = threading.Thread(target=build)
    thread.start()
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    for _ in range(10):
        assert any(each is model for each in compiled.live_models())
    done.set()
    thread.join()
    assert built.is_set() and not errors and objects
