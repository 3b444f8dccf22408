"""LoRAConv1DTranspose, LoRAConv2DTranspose, LoRAConv3DTranspose."""

import keras

from keras_lora.layers.substituted import Axes
from keras_lora.layers.substituted import SubstitutedLayer


@keras.saving.register_keras_serializable(package="keras_lora")
class LoRAConv1DTranspose(SubstitutedLayer, keras.layers.Conv1DTranspose):
    """1D transposed convolution with a frozen kernel and a low-rank update.

        y = activation(conv_transpose(x, W + scaling * A @ B) + bias)

        W   (k, filters, channels)   frozen
        A   (channels, rank)           starts as U(±1/sqrt(channels))
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
        A   (channels, rank)           starts as U(±1/sqrt(channels))
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
        A   (channels, rank)           starts as U(±1/sqrt(channels))
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
