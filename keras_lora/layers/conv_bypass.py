"""What a convolution's A and B do to its inputs."""

import keras
from keras import ops


def down(layer, inputs, a):
    """The convolution with A, to the rank."""
    if layer.groups > 1:
        # Every group of channels goes through the same A.
        a = ops.tile(a, (1,) * (len(a.shape) - 1) + (layer.groups,))
    if as_products(layer) and set(layer.kernel_size + layer.strides) == {1}:
        return ops.matmul(inputs, ops.reshape(a, a.shape[-2:]))
    if a.shape[-1] == 1 and keras.backend.backend() == "torch":
        # Its convolution on a CPU has no gradient for one row and one filter.
        axis = -1 if layer.data_format == "channels_last" else 1
        both = layer.linear(inputs, ops.repeat(a, 2, axis=-1))
        return ops.take(both, [0], axis=axis)
    return layer.linear(inputs, a)


def up(layer, hidden, b):
    """The 1x1 convolution with B, from the rank to the filters."""
    if as_products(layer):
        return ops.matmul(hidden, b)
    return ops.conv(
        hidden,
        ops.reshape(b, (1,) * layer.rank + tuple(b.shape)),
        padding="valid",
        data_format=layer.data_format,
    )


def as_products(layer):
    """Whether a 1x1 convolution is a product here, which is faster on a CPU."""
    return layer.groups == 1 and layer.data_format == "channels_last"
