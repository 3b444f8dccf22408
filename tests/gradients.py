"""Gradients of a scalar function of a layer's outputs, on every backend."""

import keras
import numpy as np
from layer_cases import to_numpy


def gradients(layer, inputs, weights, training=True, compiled=False):
    """d sum(weights * layer(inputs)) by A, B, DoRA's m and float inputs.

    Of a plain layer by its weights.
    """
    backend = _BACKENDS[keras.backend.backend()]
    return backend(layer, inputs, weights, training, compiled)


def factors(layer):
    return [variable.value for variable in factor_variables(layer)]


def factor_variables(layer):
    """Those of its adapters, or of a plain layer all its weights."""
    if not hasattr(layer, "loras"):
        return layer.trainable_variables
    adapters = layer.loras.values()
    return [x for adapter in adapters for x in adapter.named_factors().values()]


def _tensorflow(layer, inputs, weights, training, compiled):
    import tensorflow as tf

    def found(x):
        with tf.GradientTape() as tape:
            if x.dtype.is_floating:
                tape.watch(x)
            loss = tf.reduce_sum(layer(x, training=training) * weights)
        sources = factors(layer) + [x] * x.dtype.is_floating
        return [tf.convert_to_tensor(g) for g in tape.gradient(loss, sources)]

    found = tf.function(found) if compiled else found
    return [np.asarray(g) for g in found(tf.constant(inputs))]


def _torch(layer, inputs, weights, training, compiled):
    import torch

    x = torch.tensor(inputs)
    x.requires_grad = x.is_floating_point()
    loss = (layer(x, training=training) * torch.tensor(weights)).sum()
    sources = factors(layer) + [x] * x.is_floating_point()
    return [to_numpy(g) for g in torch.autograd.grad(loss, sources)]


def _jax(layer, inputs, weights, training, compiled):
    import jax

    trained = [v.value for v in layer.trainable_variables]
    other = [v.value for v in layer.non_trainable_variables]

    def loss(trained, x):
        outputs, _ = layer.stateless_call(trained, other, x, training=training)
        return (outputs * weights).sum()

    floats = np.issubdtype(inputs.dtype, np.floating)
    found = jax.grad(loss, argnums=(0, 1)[: 1 + floats])
    found = jax.jit(found) if compiled else found
    of_trained, *of_inputs = found(trained, inputs)
    ids = [id(v) for v in layer.trainable_variables]
    own = [of_trained[ids.index(id(v))] for v in factor_variables(layer)]
    return [np.asarray(g) for g in (*own, *of_inputs)]


_BACKENDS = {"tensorflow": _tensorflow, "torch": _torch, "jax": _jax}
