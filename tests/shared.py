"""What several test files need: adapting, training and comparing models."""

import keras
import numpy as np
from layer_cases import fill, to_numpy
from models import x, y
from pretrained import subclassed, transformer

import keras_lora
from keras_lora import apply_lora

# Summed in another order the last bits differ; relative to the largest output.
TOLERANCE = 1e-5


def assert_close(actual, expected, tolerance=TOLERANCE):
    expected = to_numpy(expected)
    assert_within(actual, expected, tolerance * np.abs(expected).max())


def assert_equal_bits(actual, expected, case=None):
    """To the bit, or to as many last places as a case says."""
    expected = to_numpy(expected)
    places = case.last_places if case else 0
    assert_within(actual, expected, places * np.spacing(np.abs(expected).max()))


def assert_within(actual, expected, limit):
    """An error of one line says what differs."""
    actual = to_numpy(actual)
    assert actual.shape == expected.shape
    off = np.abs(actual.astype("float64") - expected)
    wrong = ~(off <= limit)
    if wrong.any():
        place = np.unravel_index(np.where(wrong, off, -1).argmax(), off.shape)
        raise AssertionError(
            f"{wrong.sum()} of {wrong.size} values differ by more than {limit:.3g}, "
            f"most at {tuple(map(int, place))}: {actual[place]}, not {expected[place]}"
        )


# How to compile where a trace would show no more than the steps themselves: on
# TensorFlow a trace takes longer than many steps.
EAGERLY = {"run_eagerly": True}
if keras.backend.backend() != "tensorflow":
    EAGERLY = {"jit_compile": False}


def runs_eagerly(model):
    """Of the constructions one is traced, the Sequential model."""
    is_traced = isinstance(model, keras.Sequential)
    return keras.backend.backend() == "tensorflow" and not is_traced


def predict(model):
    if runs_eagerly(model) and not getattr(model, "compiled", False):
        return to_numpy(model(x(), training=False))
    return model.predict(x(), verbose=0)


def state(model):
    return [(v.path, v.trainable, to_numpy(v)) for v in model.weights]


def optimizer_state(model):
    return [to_numpy(v) for v in model.optimizer.variables]


def assert_same_state(before, after):
    for (path, trainable, value), now in zip(before, after, strict=True):
        assert (path, trainable) == now[:2]
        np.testing.assert_array_equal(value, now[2])


HEADS = {subclassed: "head"}  # whose graph does not tell


def adapt(build, **kwargs):
    model = build()
    if build in HEADS:
        kwargs.setdefault("exclude", [HEADS[build]])
    return model, apply_lora(model, **{"rank": 2, "alpha": 6, **kwargs})


def fit(model, epochs=1):
    return losses(model, x(), y(), epochs)


def losses(model, inputs, targets, epochs, batch_size=8, **more):
    """The loss of each epoch of `fit`, with all rows in their order.

    Without tf.data where that would take longer than the steps of eager mode.
    """
    options = {"batch_size": batch_size, "shuffle": False, "verbose": 0, **more}
    if more or not model.run_eagerly or keras.backend.backend() != "tensorflow":
        fitted = model.fit(inputs, targets, epochs=epochs, **options)
        return fitted.history["loss"]
    found = []
    for _ in range(epochs):
        model.reset_metrics()
        for start in range(0, len(inputs), batch_size):
            rows = slice(start, start + batch_size)
            loss = model.train_on_batch(inputs[rows], targets[rows])
        found.append(float(loss))
    return found


def assert_same(actual, expected):
    """To the bit on TensorFlow. JAX compiles anew and sums in another order, and
    torch's bits depend on how a kernel lies in memory."""
    tolerance = 0.0 if keras.backend.backend() == "tensorflow" else 1e-6
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


def compile_(model):
    how = EAGERLY if runs_eagerly(model) else {"jit_compile": False}
    model.compile(keras.optimizers.Adam(0.02), "mse", **how)
    return model


def flags(model):
    return [
        (type(layer), layer.trainable, [(w.path, w.trainable) for w in layer.weights])
        for layer in model._flatten_layers()
    ]


def same_base(model, build):
    """A plain model with the weights of the given one."""
    keras_lora.remove_lora(model)
    plain = build()
    plain.set_weights(model.get_weights())
    return plain


def adapted(build=transformer, **kwargs):
    """A compiled model, in which all that trains has other values than at first."""
    model, _ = adapt(build, **kwargs)
    compile_(model)
    for seed, variable in enumerate(model.trainable_variables):
        fill(variable, seed, 0.3)
    return model
