"""Parts of a model that are computed once more for their gradients."""

import keras
import numpy as np
import pytest
import test_quantized
from gradients import gradients
from layer_cases import CASES, DORA, KINDS, SUBSTITUTED, fill, over, to_numpy
from seeds import set_seed
from shared import assert_close
from test_quantized import HOSTS, over_kept

import keras_lora
from keras_lora.layers.adapter import LowRankAdapter
from keras_lora.layers.dora import DoRAAdapter
from keras_lora.models.sites import adapted_sites

pytestmark = test_quantized.pytestmark
BACKEND = keras.backend.backend()
DROPOUT = [case for case in CASES if case.lora.get("dropout")]


class Block(keras.layers.Layer):
    """A layer that calls another, which knows from the outside whether it trains."""

    def __init__(self, layer, remat):
        super().__init__()
        self.layer, self.remat = layer, remat

    def call(self, inputs, training=None):
        if not self.remat:
            return self.layer(inputs)
        # A new function each time: JAX keeps what it has traced one for, weights too.
        return keras.remat(lambda inputs: self.layer(inputs))(inputs)


class Around(keras.layers.Layer):
    """A layer in a block, for `gradients`."""

    def __init__(self, layer, remat=False):
        super().__init__()
        self.block = Block(layer, remat)

    @property
    def loras(self):
        return self.block.layer.loras

    def call(self, inputs, training=None):
        return self.block(inputs, training=training)


def in_scope(case, **overrides):
    with keras.RematScope(mode="full"):
        return case.trained_layer(**overrides)


def refuse_merged_kernels(monkeypatch):
    """From now on no kernel is formed of W and the adapter."""
    for adapter in (LowRankAdapter, DoRAAdapter):
        monkeypatch.setattr(adapter, "effective_kernel", None)


def weights_of(layer, inputs):
    outputs = to_numpy(layer(inputs))
    return np.random.default_rng(3).standard_normal(outputs.shape).astype("float32")


def found(layer, inputs, weights):
    for adapter in layer.loras.values():
        if adapter.seed_generator is not None:
            adapter.seed_generator.state.assign([3, 5])
    return gradients(layer, inputs, weights)


def assert_same_gradients(rematerialized, plain, inputs, monkeypatch, merges=False):
    weights = weights_of(plain, inputs)
    expected = found(plain, inputs, weights)
    rematerialized(inputs)  # which builds what is around it
    if not merges:
        refuse_merged_kernels(monkeypatch)
    for own, other in zip(
        found(rematerialized, inputs, weights), expected, strict=True
    ):
        assert np.abs(other).max() > 0
        assert_close(own, other)


@over(KINDS + DROPOUT + SUBSTITUTED + DORA)
def test_layers_made_in_a_scope_train(case, monkeypatch):
    plain, rematerialized = case.trained_layer(), in_scope(case)
    rematerialized.set_weights(plain.get_weights())
    assert_same_gradients(
        Around(rematerialized),
        Around(plain),
        case.inputs(),
        monkeypatch,
        merges=case.substituted,
    )


@over(KINDS + SUBSTITUTED + DORA[::3])
def test_functions_under_remat_train(case, monkeypatch):
    layer = case.trained_layer(**({} if case.substituted else {"dropout": 0.0}))
    assert_same_gradients(
        Around(layer, remat=True),
        Around(layer),
        case.inputs(),
        monkeypatch,
        merges=case.substituted,
    )


@over_kept
def test_quantized_layers_made_in_a_scope_train(name, mode, monkeypatch):
    host = HOSTS[name]
    plain = host.adapted(mode)
    with keras.RematScope(mode="full"):
        rematerialized = host.adapted(mode)
    rematerialized.set_weights(plain.get_weights())
    assert_same_gradients(
        Around(rematerialized), Around(plain), host.inputs(), monkeypatch
    )


def block(remat):
    """A model of a block that was made in a scope, with dropout of its adapters."""
    set_seed(4)
    inputs = keras.Input((4, 6))
    with keras.RematScope(mode="full" if remat else None):
        attention = keras.layers.MultiHeadAttention(2, 3, name="attention")
    outputs = keras.layers.Dense(3, name="head")(attention(inputs, inputs))
    model = keras.Model(inputs, outputs)
    keras_lora.apply_lora(model, rank=2, dropout=0.3)
    for seed, variable in enumerate(model.trainable_variables):
        fill(variable, seed, 0.3)
    # Of its own accord each layer draws a seed, and a block one for each of them.
    for layer in adapted_sites(model):
        layer.lora.seed_generator.state.assign([3, 5])
    return model


def test_blocks_made_in_a_scope_train():
    losses = []
    random = np.random.default_rng(3)
    x, y = (random.standard_normal((8, 4, n), "float32") for n in (6, 3))
    for remat in (False, True):
        model = block(remat)
        model.compile("sgd", "mse", jit_compile=False)
        history = model.fit(x, y, batch_size=4, epochs=3, shuffle=False, verbose=0)
        losses.append(history.history["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-5)


class Bound(keras.layers.Layer):
    """As the documentation of `keras.remat` has it."""

    def __init__(self, weights, **kwargs):
        super().__init__(**kwargs)
        self.count = weights
        self.function = keras.remat(self.inner)

    def build(self, input_shape):
        shape = (input_shape[-1], input_shape[-1])
        names = [f"w{n}" for n in range(self.count)]
        self.listed = [self.add_weight(shape=shape, name=name) for name in names]

    def inner(self, inputs):
        for weight in self.listed:
            inputs = keras.ops.matmul(inputs, weight)
        return inputs

    def call(self, inputs):
        return self.function(inputs)


@pytest.mark.parametrize("weights", [1, 2])
def test_functions_that_are_bound_to_a_layer_are_refused(weights):
    """They compute with the weights of the layer, and not with those of a call."""
    layer = Bound(weights, name="bound")
    model = keras.Sequential([keras.Input((4,)), layer])
    with pytest.raises(ValueError, match=r"'bound' keeps 'function'.*in `call`"):
        keras_lora.apply_lora(model, target=["bound"])
    assert type(layer) is Bound


class Calling(keras.layers.Layer):
    """Computes with its own weight under `keras.remat`."""

    def build(self, input_shape):
        self.w = self.add_weight(shape=(input_shape[-1], 4), name="w")

    def call(self, inputs):
        return keras.remat(lambda inputs: keras.ops.matmul(inputs, self.w))(inputs)


def test_weights_that_are_read_under_remat_train_or_are_refused():
    """TensorFlow has gradients for variables alone there, and W + delta is none."""
    layer = Calling(name="calling")
    model = keras.Sequential([keras.Input((4,)), layer])
    if BACKEND == "tensorflow":
        with pytest.raises(ValueError, match=r"'calling'.*calls keras.remat.*Scope"):
            keras_lora.apply_lora(model, target=["calling"])
        return
    keras_lora.apply_lora(model, rank=2, target=["calling"])
    fill(layer.lora.b, 3)
    before = to_numpy(layer.lora.b)
    model.compile("sgd", "mse", jit_compile=False)
    model.fit(np.ones((2, 4)), np.ones((2, 4)), verbose=0)
    assert np.abs(to_numpy(layer.lora.b) - before).max() > 0


@over(DROPOUT)
def test_dropout_under_remat_of_a_function_is_one_or_refused(case, monkeypatch):
    """TensorFlow tells nowhere which run a second one repeats."""
    layer, inputs = case.trained_layer(), case.inputs()
    around = Around(layer, remat=True)
    weights = weights_of(around, inputs)  # without training nothing is dropped
    if BACKEND == "tensorflow":
        with pytest.raises(ValueError, match="RematScope, or set dropout=0"):
            gradients(around, inputs, weights)
        return
    drop, seeds = keras.random.dropout, []

    def recorded(inputs, rate, seed):
        seeds.append(seed)
        return drop(inputs, rate, seed=seed)

    monkeypatch.setattr(keras.random, "dropout", recorded)
    own = found(around, inputs, weights)

    def repeated(inputs, rate, seed):
        return drop(inputs, rate, seed=seeds[0] if BACKEND == "torch" else seed)

    monkeypatch.setattr(keras.random, "dropout", repeated)
    plain = Around(layer)
    plain(inputs)  # which builds what is around the layer
    expected = found(plain, inputs, weights)
    for gradient, other in zip(own, expected, strict=True):
        assert np.abs(other).max() > 0
        assert_close(gradient, other)


@pytest.mark.skipif(BACKEND == "tensorflow", reason="refused there")
def test_each_step_drops_other_inputs_under_remat_of_a_function():
    layer = keras_lora.LoRADense(3, rank=2, dropout=0.5)
    model = keras.Sequential([keras.Input((6,)), Around(layer, remat=True)])
    layer.lora.b.assign(np.ones(layer.lora.b.shape))
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=BACKEND == "jax")
    x, y = np.ones((8, 6), "float32"), np.zeros((8, 3), "float32")
    losses = model.fit(x, y, epochs=4, verbose=0).history["loss"]
    assert len(set(losses)) == 4


@over(KINDS + DORA)
def test_a_flag_that_is_traced_chooses_between_both_paths(case):
    layer = case.trained_layer(dropout=0.0)
    inputs = case.inputs()
    traced = traced_call(layer, inputs)
    for training in (False, True):
        assert_close(traced(training), layer(inputs, training=training))


def traced_call(layer, inputs):
    """training -> outputs, by one function for both."""

    def call(training):
        return layer(inputs, training=training)

    if BACKEND == "jax":
        import jax

        return jax.jit(call)
    if BACKEND == "torch":
        return call
    import tensorflow as tf

    function = tf.function(call)
    return lambda training: function(tf.constant(training))
