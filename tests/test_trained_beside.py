"""Heads and biases that train beside A and B: remembered, saved, and undone."""

import contextlib
import pickle
import warnings

import keras
import numpy as np
import pytest
from layer_cases import to_numpy
from models import x, y
from seeds import set_seed

import keras_lora


def network():
    set_seed(5)
    inputs = keras.Input((6,))
    hidden = keras.layers.Dense(8, name="h")(inputs)
    hidden = keras.layers.LayerNormalization(name="norm")(hidden)
    hidden = keras.layers.BatchNormalization(name="batch")(hidden)
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(hidden))


BESIDE = {"h/bias", "norm/beta", "head/kernel", "head/bias"}


def predict(model):
    return to_numpy(model(x(), training=False))


def moved(**kwargs):
    """An adapted model in which everything that trains has other values."""
    model = network()
    keras_lora.apply_lora(model, rank=2, **kwargs)
    random = np.random.default_rng(1)
    for variable in model.trainable_variables:
        variable.assign(random.normal(size=variable.shape))
    return model


@pytest.fixture
def full():
    return moved(bias="all", also_train=["head"])


def beside(model):
    return {v.path for v in model.trainable_variables if "lora" not in v.path}


def test_bias_means_every_variable_that_torch_calls_so():
    model = network()
    keras_lora.apply_lora(model, rank=2, bias="all")
    # But for batch normalization, whose statistics would move.
    assert beside(model) == {"h/bias", "norm/beta", "head/bias"}
    assert not model.get_layer("batch").trainable


@pytest.mark.parametrize("frozen_by", ["hand", "load", "file"])
def test_what_is_frozen_is_saved_all_the_same(full, frozen_by, tmp_path):
    keras_lora.save_adapter(full, tmp_path / "adapter")
    model = full
    if frozen_by == "hand":
        model.trainable = False
    elif frozen_by == "load":
        model = network()
        keras_lora.load_adapter(model, tmp_path / "adapter", trainable=False)
    else:
        model.trainable = False
        model.save(tmp_path / "model.keras")
        model = keras.models.load_model(tmp_path / "model.keras")
    assert model.trainable_variables == []
    assert "head, " in f"{keras_lora.summary(model)}, ".replace("\n", ", ")
    keras_lora.save_adapter(model, tmp_path / "again")
    one, other = (
        keras_lora.Adapter.read(tmp_path / name) for name in ("adapter", "again")
    )
    assert one.tensors.keys() == other.tensors.keys()
    assert one.config == other.config
    for key, value in one.tensors.items():
        np.testing.assert_array_equal(value, other.tensors[key])


def test_training_goes_on_after_a_frozen_load(full, tmp_path):
    keras_lora.save_adapter(full, tmp_path / "adapter")
    model = network()
    keras_lora.load_adapter(model, tmp_path / "adapter", trainable=False)
    assert model.trainable_variables == []
    keras_lora.load_adapter(model, tmp_path / "adapter", trainable=True)
    assert beside(model) == BESIDE
    before = {v.path: to_numpy(v) for v in model.variables}
    model.compile("sgd", "mse")
    model.fit(x(), y(), verbose=0)
    changed = {v.path for v in model.variables if (to_numpy(v) != before[v.path]).any()}
    assert changed == {*BESIDE, "h/lora/a", "h/lora/b"}


def test_a_compiled_model_trains_what_the_file_brings(full, tmp_path):
    keras_lora.save_adapter(full, tmp_path / "adapter")
    model = moved()
    model.compile(keras.optimizers.Adam(0.1), "mse")
    model.fit(x(), y(), verbose=0)  # the optimizer knows A and B alone
    keras_lora.load_adapter(model, tmp_path / "adapter")
    before = {v.path: to_numpy(v) for v in model.trainable_variables}
    model.fit(x(), y(), verbose=0)
    for variable in model.trainable_variables:
        assert (to_numpy(variable) != before[variable.path]).any()


def test_training_goes_on_inside_of_owners_that_were_frozen(tmp_path):
    inner, inputs = network(), keras.Input((6,))
    outer = keras.Model(inputs, inner(inputs))
    keras_lora.apply_lora(outer, rank=2, also_train=["head"])
    trains = [v.path for v in outer.trainable_variables]
    keras_lora.save_adapter(outer, tmp_path)
    outer.trainable = False
    assert outer.trainable_variables == []
    keras_lora.load_adapter(outer, tmp_path)
    assert [v.path for v in outer.trainable_variables] == trains


@pytest.mark.parametrize("recorded", [False, True])
def test_the_statistics_of_a_normalization_that_trains_go_along(recorded, tmp_path):
    def build():
        if recorded:
            model = network()
            keras_lora.apply_lora(model, rank=2, also_train=["batch"])
            return model
        layers = [keras_lora.LoRADense(8, name="h"), keras.layers.BatchNormalization()]
        return keras.Sequential([keras.Input((6,)), *layers])

    model, loaded = build(), build()
    loaded.set_weights(model.get_weights())
    batch = model.layers[3 if recorded else 1]
    batch.moving_mean.assign(np.linspace(-1, 1, 8))
    batch.moving_variance.assign(np.linspace(1, 2, 8))
    keras_lora.save_adapter(model, tmp_path)
    keras_lora.load_adapter(loaded, tmp_path)
    np.testing.assert_allclose(predict(loaded), predict(model), atol=1e-6)


@pytest.mark.parametrize("undo", [keras_lora.merge_lora, keras_lora.remove_lora])
def test_what_trained_beside_an_adapter_that_is_gone_is_forgotten(full, undo, tmp_path):
    undo(full)
    tuned = predict(full)
    keras_lora.apply_lora(full, rank=2)
    keras_lora.save_adapter(full, tmp_path)
    assert len(keras_lora.Adapter.read(tmp_path).tensors) == 2
    keras_lora.remove_lora(full)
    np.testing.assert_allclose(predict(full), tuned, atol=1e-6)


def test_flags_that_are_right_are_left_and_nothing_is_traced_anew(full, tmp_path):
    keras_lora.save_adapter(full, tmp_path / "adapter")
    predict(full)
    function = full.predict_function
    keras_lora.load_adapter(full, tmp_path / "adapter")
    assert full.predict_function is function
    constructed = keras.Sequential(
        [keras.Input((6,)), keras_lora.LoRADense(4, name="l"), keras.layers.Dense(2)]
    )
    keras_lora.save_adapter(constructed, tmp_path / "other")
    keras_lora.load_adapter(constructed, tmp_path / "other")
    assert len(constructed.trainable_variables) == 5  # as nobody asked otherwise


def test_an_adapter_without_a_head_brings_the_bases_own_back(full, tmp_path):
    """And the other way round: the head of the first is recorded when it comes."""
    bare = moved()
    keras_lora.save_adapter(full, tmp_path / "full")
    keras_lora.save_adapter(bare, tmp_path / "bare")
    expected = {"full": predict(full), "bare": predict(bare)}
    for model in (full, bare):
        for name in ("full", "bare", "full", "bare"):
            keras_lora.load_adapter(model, tmp_path / name)
            np.testing.assert_allclose(predict(model), expected[name], atol=1e-5)
    keras_lora.remove_lora(bare)
    np.testing.assert_allclose(predict(bare), predict(network()), atol=1e-6)


@pytest.mark.parametrize("reload", [False, True])
def test_the_base_model_is_the_base_model(full, reload, tmp_path):
    tuned = predict(full)
    if reload:
        full.save(tmp_path / "model.keras")
        full = keras.models.load_model(tmp_path / "model.keras")
    with keras_lora.disabled(full):
        np.testing.assert_allclose(predict(full), predict(network()), atol=1e-6)
    np.testing.assert_allclose(predict(full), tuned, atol=1e-6)
    keras_lora.remove_lora(full)
    plain = network()
    np.testing.assert_allclose(predict(full), predict(plain), atol=1e-6)
    for one, other in zip(full.variables, plain.variables, strict=True):
        assert (one.path, one.trainable) == (other.path, other.trainable)
        np.testing.assert_array_equal(to_numpy(one), to_numpy(other))


def test_merging_keeps_what_was_trained(full):
    tuned = predict(full)
    keras_lora.merge_lora(full)
    np.testing.assert_allclose(predict(full), tuned, atol=1e-5)


def test_biases_of_a_model_that_was_only_marked(tmp_path):
    def constructed():
        set_seed(5)
        layers = [keras_lora.LoRADense(4, rank=2, name="l"), keras.layers.Dense(3)]
        return keras.Sequential([keras.Input((6,)), *layers])

    model = constructed()
    base = predict(model)
    keras_lora.mark_only_lora_as_trainable(model, bias="all")
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(x(), y(), epochs=3, verbose=0)
    tuned = predict(model)
    model.trainable = False
    keras_lora.save_adapter(model, tmp_path / "adapter")
    other = constructed()
    keras_lora.load_adapter(other, tmp_path / "adapter")
    np.testing.assert_allclose(predict(other), tuned, atol=1e-6)
    for each in (model, other):
        with keras_lora.disabled(each):
            np.testing.assert_allclose(predict(each), base, atol=1e-6)


def test_records_are_found_from_inside_and_from_around(tmp_path):
    inner = network()
    inputs = keras.Input((6,))
    outer = keras.Model(inputs, inner(inputs), name="outer")
    base = predict(outer)
    keras_lora.apply_lora(outer, rank=2, target=["h"], also_train=["head"])
    keras_lora.save_adapter(inner, tmp_path / "inner")
    assert "head.weight" in " ".join(
        keras_lora.Adapter.read(tmp_path / "inner").tensors
    )
    inner.get_layer("head").kernel.assign(np.ones((8, 3)))
    keras_lora.remove_lora(inner)
    np.testing.assert_allclose(predict(outer), base, atol=1e-6)
    assert all(layer.trainable for layer in inner.layers)
    keras_lora.apply_lora(outer, rank=2)


def test_a_dry_run_remembers_nothing(tmp_path):
    model = network()
    keras_lora.apply_lora(model, rank=2, also_train=["head"], dry_run=True)
    keras_lora.apply_lora(model, rank=2)
    keras_lora.save_adapter(model, tmp_path / "adapter")
    assert len(keras_lora.Adapter.read(tmp_path / "adapter").tensors) == 2


@pytest.mark.parametrize("nested", [False, True])
def test_what_is_written_without_the_adapters_is_what_was_trained(
    full, nested, tmp_path
):
    expected = predict(full)
    with contextlib.ExitStack() as contexts:
        if nested:
            contexts.enter_context(keras_lora.disabled(full))
        with keras_lora.disabled(full):
            base = predict(full)
        contexts.enter_context(keras_lora.disabled(full))
        assert np.abs(predict(full) - expected).max() > 0.1
        full.save(tmp_path / "model.keras")
        full.save_weights(tmp_path / "model.weights.h5")
        keras_lora.save_adapter(full, tmp_path / "adapter")
        copy = pickle.loads(pickle.dumps(full))
        np.testing.assert_array_equal(predict(full), base)
    weights = moved(bias="all", also_train=["head"])
    weights.load_weights(tmp_path / "model.weights.h5")
    loaded = network()
    loaded.set_weights([to_numpy(v) for v in network().variables])
    keras_lora.load_adapter(loaded, tmp_path / "adapter")
    whole = keras.models.load_model(tmp_path / "model.keras")
    for other in (whole, weights, copy, loaded):
        np.testing.assert_allclose(predict(other), expected, atol=1e-6)
        with keras_lora.disabled(other):
            np.testing.assert_allclose(predict(other), base, atol=1e-6)
    np.testing.assert_array_equal(predict(full), expected)


def test_contexts_that_do_not_nest_give_back_what_was_trained(full):
    expected = predict(full)
    with keras_lora.disabled(full):
        base = predict(full)
    for order in (1, -1):
        contexts = [keras_lora.disabled(full), keras_lora.disabled(full)]
        for context in contexts:
            context.__enter__()
        last, early = contexts[::order]
        early.__exit__(None, None, None)
        np.testing.assert_array_equal(predict(full), base)
        last.__exit__(None, None, None)
        np.testing.assert_array_equal(predict(full), expected)


def test_what_holds_the_head_alone_does_not_train_inside_of_disabled(full):
    head = full.get_layer("head")
    beside = keras.Sequential([keras.Input((8,)), head])
    beside.compile("sgd", "mse")
    data, trained = np.ones((4, 8)), to_numpy(head.kernel)
    with (
        keras_lora.disabled(full),
        pytest.raises(ValueError, match="do not train inside"),
    ):
        beside.fit(data, np.ones((4, 3)), verbose=0)
    np.testing.assert_array_equal(to_numpy(head.kernel), trained)
    beside.fit(data, np.ones((4, 3)), verbose=0)


def test_a_loop_of_ones_own_that_trains_inside_of_disabled_is_told(full):
    expected = predict(full)
    head = full.get_layer("head")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with keras_lora.disabled(full):
            predict(full)
    lost = pytest.warns(UserWarning, match=f"{head.bias.path}.*is lost")
    with lost as found, keras_lora.disabled(full), keras_lora.disabled(full):
        head.bias.assign(head.bias + 1)
    (told,) = [warning for warning in found if "is lost" in str(warning.message)]
    assert told.filename == __file__
    np.testing.assert_array_equal(predict(full), expected)


@pytest.mark.parametrize("way", ["model", "head", "batch"])
def test_what_flags_let_train_is_remembered_when_training_begins(way, tmp_path):
    model, base = network(), predict(network())
    model.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=True)
    keras_lora.apply_lora(model, rank=2, target=["h"])
    model.fit(x(), y(), verbose=0)
    if way == "model":
        model.trainable = False
        model.trainable = True
    else:
        model.get_layer(way).trainable = True
    model.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=True)
    model.train_on_batch(x(), y())
    model.fit(x(), y(), verbose=0)
    trained = predict(model)
    with keras_lora.disabled(model):
        np.testing.assert_allclose(predict(model), base, atol=1e-6)
    np.testing.assert_array_equal(predict(model), trained)
    model.save(tmp_path / "model.keras")
    for each in (keras.models.load_model(tmp_path / "model.keras"), model):
        np.testing.assert_allclose(predict(each), trained, atol=1e-6)
        keras_lora.remove_lora(each)
        np.testing.assert_allclose(predict(each), base, atol=1e-6)


def test_what_a_loop_of_ones_own_trains_beside_is_told():
    model = network()
    keras_lora.apply_lora(model, rank=2, target=["h"])
    model.get_layer("head").trainable = True
    for take_off in (keras_lora.disabled, keras_lora.remove_lora):
        with pytest.warns(UserWarning, match="head/kernel.*head/bias.*also_train"):
            take_off(model)
