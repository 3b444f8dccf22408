"""Transposed, separable and depthwise convolutions with low-rank adapters."""

import keras

from keras_lora.layers.form import Axes
from keras_lora.layers.substituted import SeveralWeights, SubstitutedLayer


@keras.saving.register_keras_serializable(package="keras_lora")
class LoRAConv1DTranspose(SubstitutedLayer, keras.layers.Conv1DTranspose):
    """1D transposed convolution with a frozen kernel and a low-rank update.

        y = activation(conv_transpose(x, W + scaling * A @ B) + bias)

        W   (k, filters, channels)   frozen
        A   (channels, rank)         starts as U(±1/sqrt(channels))
        B   (rank, k, filters)       starts as 0

    W + scaling * A @ B is formed in every call, in training too. There is no dropout.
    At the start B = 0, and the layer equals `keras.layers.Conv1DTranspose`, whose
    arguments it takes.

    Input shape: `(batch, steps, channels)`. Output shape: the same
    with filters, and larger axes.

    Examples:
        >>> layer = LoRAConv1DTranspose(16, 3, strides=2, rank=4)
        >>> tuple(layer(keras.ops.ones((2, 10, 8))).shape)
        (2, 21, 16)
    """

    plain_class = keras.layers.Conv1DTranspose
    weight_axes = {"kernel": Axes((2,))}  # noqa: RUF012
    linear_weights = ("kernel",)


@keras.saving.register_keras_serializable(package="keras_lora")
class LoRAConv2DTranspose(SubstitutedLayer, keras.layers.Conv2DTranspose):
    """2D transposed convolution with a frozen kernel and a low-rank update.

        y = activation(conv_transpose(x, W + scaling * A @ B) + bias)

        W   (h, w, filters, channels)   frozen
        A   (channels, rank)            starts as U(±1/sqrt(channels))
        B   (rank, h, w, filters)       starts as 0

    W + scaling * A @ B is formed in every call, in training too. There is no dropout.
    At the start B = 0, and the layer equals `keras.layers.Conv2DTranspose`, whose
    arguments it takes.

    Input shape: `(batch, height, width, channels)`. Output shape: the same
    with filters, and larger axes.

    Examples:
        >>> layer = LoRAConv2DTranspose(16, 3, strides=2, rank=4)
        >>> tuple(layer(keras.ops.ones((2, 5, 5, 8))).shape)
        (2, 11, 11, 16)
    """

    plain_class = keras.layers.Conv2DTranspose
    weight_axes = {"kernel": Axes((3,))}  # noqa: RUF012
    linear_weights = ("kernel",)


@keras.saving.register_keras_serializable(package="keras_lora")
class LoRAConv3DTranspose(SubstitutedLayer, keras.layers.Conv3DTranspose):
    """3D transposed convolution with a frozen kernel and a low-rank update.

        y = activation(conv_transpose(x, W + scaling * A @ B) + bias)

        W   (d, h, w, filters, channels)   frozen
        A   (channels, rank)               starts as U(±1/sqrt(channels))
        B   (rank, d, h, w, filters)       starts as 0

    W + scaling * A @ B is formed in every call, in training too. There is no dropout.
    At the start B = 0, and the layer equals `keras.layers.Conv3DTranspose`, whose
    arguments it takes.

    Input shape: `(batch, depth, height, width, channels)`. Output shape: the same
    with filters, and larger axes.

    Examples:
        >>> layer = LoRAConv3DTranspose(8, 2, rank=4)
        >>> tuple(layer(keras.ops.ones((1, 3, 3, 3, 4))).shape)
        (1, 4, 4, 4, 8)
    """

    plain_class = keras.layers.Conv3DTranspose
    weight_axes = {"kernel": Axes((4,))}  # noqa: RUF012
    linear_weights = ("kernel",)


@keras.saving.register_keras_serializable(package="keras_lora")
class LoRASeparableConv1D(SeveralWeights, keras.layers.SeparableConv1D):
    """1D separable convolution with frozen kernels and a low-rank update of each.

        y = activation(conv1x1(depthwise(x, D + scaling * A @ B), P + scaling * F @ G) + bias)

        D   (k, channels, multiplier)             frozen
        A   (k, rank)                             starts as U(±1/sqrt(k))
        B   (rank, channels, multiplier)          starts as 0
        P   (1, channels * multiplier, filters)   frozen; F and G as A and B of a Dense layer

    The kernels with their updates are formed in every call, in training too. There is
    no dropout. The rank of D's update is at most the size of the window. At the start
    the layer equals `keras.layers.SeparableConv1D`, whose arguments it takes.
    `layer.loras` holds both adapters.

    Input shape: `(batch, steps, channels)`. Output shape: the same with filters.

    Examples:
        >>> layer = LoRASeparableConv1D(16, 3, rank=2)
        >>> tuple(layer(keras.ops.ones((2, 10, 8))).shape)
        (2, 8, 16)
    """  # noqa: E501

    plain_class = keras.layers.SeparableConv1D
    adapted_weights = ("depthwise_kernel", "pointwise_kernel")
    linear_weights = ("pointwise_kernel",)
    weight_axes = {  # noqa: RUF012
        "depthwise_kernel": Axes((0,)),
        "pointwise_kernel": Axes((0, 1)),
    }


@keras.saving.register_keras_serializable(package="keras_lora")
class LoRADepthwiseConv1D(SubstitutedLayer, keras.layers.DepthwiseConv1D):
    """1D depthwise convolution with a frozen kernel and a low-rank update.

        y = activation(depthwise(x, W + scaling * A @ B) + bias)

        W   (k, channels, multiplier)      frozen
        A   (k, rank)                      starts as U(±1/sqrt(k))
        B   (rank, channels, multiplier)   starts as 0

    W + scaling * A @ B is formed in every call, in training too. There is no dropout,
    and a rank above the size of the window adds nothing. At the start the layer
    equals `keras.layers.DepthwiseConv1D`, whose arguments it takes.

    Input shape: `(batch, steps, channels)`. Output shape: the same with
    channels * multiplier.

    Examples:
        >>> layer = LoRADepthwiseConv1D(3, depth_multiplier=2, rank=2)
        >>> tuple(layer(keras.ops.ones((2, 10, 8))).shape)
        (2, 8, 16)
    """

    plain_class = keras.layers.DepthwiseConv1D
    weight_axes = {"kernel": Axes((0,))}  # noqa: RUF012


@keras.saving.register_keras_serializable(package="keras_lora")
class LoRASeparableConv2D(SeveralWeights, keras.layers.SeparableConv2D):
    """2D separable convolution with frozen kernels and a low-rank update of each.

        y = activation(conv1x1(depthwise(x, D + scaling * A @ B), P + scaling * F @ G) + bias)

        D   (h, w, channels, multiplier)             frozen
        A   (h, w, rank)                             starts as U(±1/sqrt(h * w))
        B   (rank, channels, multiplier)             starts as 0
        P   (1, 1, channels * multiplier, filters)   frozen; F and G as A and B of a Dense layer

    The kernels with their updates are formed in every call, in training too. There is
    no dropout. The rank of D's update is at most the size of the window. At the start
    the layer equals `keras.layers.SeparableConv2D`, whose arguments it takes.
    `layer.loras` holds both adapters.

    Input shape: `(batch, height, width, channels)`. Output shape: the same with filters.

    Examples:
        >>> layer = LoRASeparableConv2D(16, 3, rank=2)
        >>> tuple(layer(keras.ops.ones((2, 6, 6, 8))).shape)
        (2, 4, 4, 16)
    """  # noqa: E501

    plain_class = keras.layers.SeparableConv2D
    adapted_weights = ("depthwise_kernel", "pointwise_kernel")
    linear_weights = ("pointwise_kernel",)
    weight_axes = {  # noqa: RUF012
        "depthwise_kernel": Axes((0, 1)),
        "pointwise_kernel": Axes((0, 1, 2)),
    }


@keras.saving.register_keras_serializable(package="keras_lora")
class LoRADepthwiseConv2D(SubstitutedLayer, keras.layers.DepthwiseConv2D):
    """2D depthwise convolution with a frozen kernel and a low-rank update.

        y = activation(depthwise(x, W + scaling * A @ B) + bias)

        W   (h, w, channels, multiplier)   frozen
        A   (h, w, rank)                   starts as U(±1/sqrt(h * w))
        B   (rank, channels, multiplier)   starts as 0

    W + scaling * A @ B is formed in every call, in training too. There is no dropout,
    and a rank above the size of the window adds nothing. At the start the layer
    equals `keras.layers.DepthwiseConv2D`, whose arguments it takes.

    Input shape: `(batch, height, width, channels)`. Output shape: the same with
    channels * multiplier.

    Examples:
        >>> layer = LoRADepthwiseConv2D(3, depth_multiplier=2, rank=2)
        >>> tuple(layer(keras.ops.ones((2, 6, 6, 8))).shape)
        (2, 4, 4, 16)
    """

    plain_class = keras.layers.DepthwiseConv2D
    weight_axes = {"kernel": Axes((0, 1))}  # noqa: RUF012
