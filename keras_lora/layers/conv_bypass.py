"""What a convolution's A and B do to its inputs."""

from keras import ops


def down(layer, inputs, a):
    """The convolution with A, to the rank."""
    if layer.groups > 1:
        # Every group of channels goes through the same A.
        a = ops.tile(a, (1,) * (len(a.shape) - 1) + (layer.groups,))
    if as_products(layer) and set(layer.kernel_size + layer.strides) == {1}:
        return ops.matmul(inputs, ops.reshape(a, a.shape[-2:]))
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
