"""An error inside of Keras's loops leaves an adapted model as it was."""

import keras
import numpy as np
import pytest
from layer_cases import fill, to_numpy
from shared import EAGERLY

import keras_lora

LOOPS = {
    "fit": lambda model, x, y, **more: model.fit(
        x, y, batch_size=4, epochs=2, verbose=0, **more
    ),
    "evaluate": lambda model, x, y, **more: model.evaluate(
        x, y, batch_size=4, verbose=0, **more
    ),
    "predict": lambda model, x, y, **more: model.predict(
        x, batch_size=4, verbose=0, **more
    ),
    "train_on_batch": lambda model, x, y: model.train_on_batch(x, y),
    "test_on_batch": lambda model, x, y: model.test_on_batch(x, y),
    "predict_on_batch": lambda model, x, y: model.predict_on_batch(x),
}
TRAINING = ("fit", "train_on_batch")
over_loops = pytest.mark.parametrize("loop", LOOPS)


def data(rows=8):
    random = np.random.default_rng(0)
    x, y = random.normal(size=(rows, 6)), random.normal(size=(rows, 3))
    return x.astype("float32"), y.astype("float32")


class Refuses(keras.layers.Layer):
    """Calls a layer, but not in training."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def call(self, inputs, training=None):
        if training:
            raise ValueError("a layer that does not train")
        return self.layer(inputs)


class Fails(keras.callbacks.Callback):
    """An error of a user's when a batch has run."""

    def fail(self, batch, logs=None):
        raise RuntimeError("a fault of the user's")

    on_train_batch_end = on_test_batch_end = on_predict_batch_end = fail


def model_of(layer):
    inputs = keras.Input((6,))
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(layer(inputs)))
    model.compile(keras.optimizers.Adam(0.01), "mse", **EAGERLY)
    keras_lora.apply_lora(model, rank=2, also_train=["head"])
    for seed, variable in enumerate(model.trainable_variables):
        fill(variable, seed, 0.3)
    return model


def state(model):
    return [to_numpy(variable) for variable in model.variables]


def assert_whole(model, before):
    """All weights are there, the frozen ones to the bit, and the model goes on."""
    for variable, value in zip(model.variables, before, strict=True):
        if variable.trainable or "seed" in variable.path:
            assert np.isfinite(to_numpy(variable)).all()
        else:
            np.testing.assert_array_equal(to_numpy(variable), value)
    x, y = data()
    assert np.isfinite(model.predict(x, verbose=0)).all()
    assert np.isfinite(model.evaluate(x, y, verbose=0))


@pytest.mark.parametrize("loop", TRAINING)
def test_what_a_layer_refuses_in_its_call_costs_no_weights(loop):
    model = model_of(Refuses(keras.layers.Dense(5, name="inner")))
    before = state(model)
    with pytest.raises(ValueError, match="a layer that does not train"):
        LOOPS[loop](model, *data())
    assert_whole(model, before)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(to_numpy(variable), value)


@pytest.mark.parametrize("loop", ["fit", "evaluate", "predict"])
def test_a_callback_that_fails_costs_no_weights(loop):
    model = model_of(keras.layers.Dense(5, name="inner"))
    before = state(model)
    with pytest.raises(RuntimeError, match="a fault of the user's"):
        LOOPS[loop](model, *data(), callbacks=[Fails()])
    assert_whole(model, before)
    moved = [not np.array_equal(*x) for x in zip(state(model), before, strict=True)]
    assert any(moved) == (loop == "fit")  # what was learned before is kept


@over_loops
def test_data_that_do_not_fit_cost_no_weights(loop):
    model = model_of(keras.layers.Dense(5, name="inner"))
    before = state(model)
    with pytest.raises(Exception):  # noqa: B017  # each backend its own
        LOOPS[loop](model, data()[0][:, :4], data()[1])
    assert_whole(model, before)
    LOOPS[loop](model, *data())  # as if nothing had been


@pytest.mark.parametrize("loop", TRAINING)
def test_training_that_is_refused_costs_no_weights(loop):
    model = model_of(keras.layers.Dense(5, name="inner"))
    before = state(model)
    for context in (keras_lora.merged, keras_lora.disabled):
        with context(model), pytest.raises(ValueError, match="Leave the context"):
            LOOPS[loop](model, *data())
    assert_whole(model, before)


def test_changes_in_a_callback_that_are_refused_cost_no_weights():
    """On JAX the weights are not in the model then."""
    model = model_of(keras.layers.Dense(5, name="inner"))
    before = state(model)

    class Change(keras.callbacks.Callback):
        def __init__(self, change):
            super().__init__()
            self.change = change

        def on_train_batch_end(self, batch, logs=None):
            self.change(self.model)

    for change, message in (
        (lambda model: keras_lora.merge_lora(model, quantized="no"), "must be None"),
        (keras_lora.apply_lora, "has an adapter"),
        (lambda model: keras_lora.load_adapter(model, "nowhere"), "does not exist"),
        (lambda model: keras_lora.export(model, "x", format="y"), "`format` must"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            model.fit(*data(), verbose=0, callbacks=[Change(change)])
        assert_whole(model, before)
