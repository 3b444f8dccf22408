"""LoRAConv1D, LoRAConv2D and LoRAConv3D, which share one mixin."""

import math
from functools import partial

import keras
import numpy as np
from keras import ops

from keras_lora.layers import loralib
from keras_lora.layers.form import LowRankForm
from keras_lora.layers.lora_layer import LoRALayer

GROUPS_NOTE = (
    " The convolution has groups: PEFT's form for it cannot be merged or loaded."
)


class LoRAConv(LoRALayer):
    """Base class of the convolutions. As in Keras, `rank` counts spatial axes."""

    factorization = "standard"
    replaces = ("call", "convolution_op")

    def __init__(self, *args, factorization: str = "standard", **kwargs):
        super().__init__(*args, **kwargs)
        self.factorization = loralib.validate_factorization(factorization)

    def linear(self, inputs, kernel):
        padding = self.padding
        if padding == "causal":
            widths = [(0, 0)] * 3
            steps = 1 if self.data_format == "channels_last" else 2
            widths[steps] = (self.dilation_rate[0] * (self.kernel_size[0] - 1), 0)
            inputs, padding = ops.pad(inputs, widths), "valid"
        return ops.conv(
            inputs,
            kernel,
            strides=list(self.strides),
            padding=padding,
            dilation_rate=self.dilation_rate,
            data_format=self.data_format,
        )

    def low_rank_form(self, rank):
        if self.factorization == "loralib":
            return loralib.loralib_convolution(self, rank)
        *window, filters = self.kernel_shape  # (*k, channels / groups, filters)
        return LowRankForm(
            a_shape=(*window, rank),
            b_shape=(rank, filters),
            fan_in=math.prod(window),
            compose=lambda a, b: ops.tensordot(a, b, axes=1),
            down=partial(down, self),
            up=partial(up, self),
            input_axes=tuple(range(self.rank + 1)),
            over_outputs=self.over_outputs,
            # Measured on a CPU: the low-rank path costs more with the rank, and a
            # convolution to few channels takes as long as one to sixteen.
            merges_from=math.prod(self.kernel_shape) * 16 // max(rank, 16),
            forms_gradient=self.groups == 1 and filters <= 2 * max(rank, 16),
            to_file=to_file,
            from_file=from_file,
            vector_to_file=lambda vector: vector.reshape(1, -1, *[1] * self.rank),
            file_note=GROUPS_NOTE if self.groups > 1 else "",
        )

    def over_outputs(self, value):
        # With all axes, because TensorFlow may align a vector with another axis.
        shape = [1] * (self.rank + 2)
        shape[-1 if self.data_format == "channels_last" else 1] = self.filters
        return ops.reshape(value, shape)

    @classmethod
    def read_loralib(cls, layer, a, b, rank, mask, module):
        if getattr(layer, "factorization", None) == "loralib":
            return a, b
        return loralib.convert_convolution(layer, a, b, rank, module)

    def get_config(self):
        return {**super().get_config(), "factorization": self.factorization}


@keras.saving.register_keras_serializable(package="keras_lora")
class LoRAConv1D(LoRAConv, keras.layers.Conv1D):
    """1D convolution with a frozen kernel and a trainable low-rank update.

        training=True    y = finish( conv(x, W) + conv1x1(conv(drop(x), A), scaling * B) )
        training=False   y = finish( conv(x, W + scaling * A @ B) )

        W   (k, channels/groups, filters)   frozen
        A   (k, channels/groups, rank)      starts as U(±1/sqrt(k * channels/groups))
        B   (rank, filters)                 starts as 0

    All groups share A. With `factorization="loralib"`, the form of microsoft/LoRA,
    delta = scaling * (B @ A) reshaped to the kernel, with

        A   (rank * k, channels * k)            starts as U(±1/sqrt(channels * k))
        B   (filters/groups, rank * k)          starts as 0

    Its rank is up to rank * k, and delta is formed in training too. At the start
    B = 0, and the layer equals `keras.layers.Conv1D`, whose arguments it takes,
    including `padding="causal"`.

    Args:
        factorization: "standard" or "loralib".

    Input shape: `(batch, steps, channels)`, or `(batch, channels, steps)` with
    data_format="channels_first". Output shape: the same with filters.

    Examples:
        >>> layer = LoRAConv1D(32, 3, padding="causal", rank=4)
        >>> tuple(layer(keras.ops.ones((2, 20, 8))).shape)
        (2, 20, 32)
    """  # noqa: E501

    plain_class = keras.layers.Conv1D


@keras.saving.register_keras_serializable(package="keras_lora")
class LoRAConv2D(LoRAConv, keras.layers.Conv2D):
    """2D convolution with a frozen kernel and a trainable low-rank update.

        training=True    y = finish( conv(x, W) + conv1x1(conv(drop(x), A), scaling * B) )
        training=False   y = finish( conv(x, W + scaling * A @ B) )

        W   (h, w, channels/groups, filters)   frozen
        A   (h, w, channels/groups, rank)      starts as U(±1/sqrt(h * w * channels/groups))
        B   (rank, filters)                    starts as 0

    All groups share A. With `factorization="loralib"`, the form of microsoft/LoRA,
    delta = scaling * (B @ A) reshaped to the kernel, with

        A   (rank * w, channels * w)           starts as U(±1/sqrt(channels * w))
        B   (filters/groups * h, rank * w)     starts as 0

    Its rank is up to rank * h * w, and delta is formed in training too. At the start
    B = 0, and the layer equals `keras.layers.Conv2D`, whose arguments it takes.

    Args:
        factorization: "standard" or "loralib".

    Input shape: `(batch, height, width, channels)`, or with channels second and
    data_format="channels_first". Output shape: the same with filters.

    Examples:
        >>> layer = LoRAConv2D(32, 3, strides=2, rank=4)
        >>> tuple(layer(keras.ops.ones((2, 9, 9, 8))).shape)
        (2, 4, 4, 32)
    """  # noqa: E501

    plain_class = keras.layers.Conv2D


@keras.saving.register_keras_serializable(package="keras_lora")
class LoRAConv3D(LoRAConv, keras.layers.Conv3D):
    """3D convolution with a frozen kernel and a trainable low-rank update.

        training=True    y = finish( conv(x, W) + conv1x1(conv(drop(x), A), scaling * B) )
        training=False   y = finish( conv(x, W + scaling * A @ B) )

        W   (k1, k2, k3, channels/groups, filters)   frozen
        A   (k1, k2, k3, channels/groups, rank)      starts as U(±1/sqrt(fan in of W))
        B   (rank, filters)                          starts as 0

    All groups share A. With `factorization="loralib"`, delta = scaling * (B @ A)
    reshaped to the kernel, in the shapes of microsoft/LoRA pull request 157:

        A   (rank * k3, channels * k3)               starts as U(±1/sqrt(channels * k3))
        B   (filters/groups * k1 * k2, rank * k3)    starts as 0

    Its rank is up to rank * k1 * k2 * k3, and delta is formed in training too. At the
    start B = 0, and the layer equals `keras.layers.Conv3D`, whose arguments it takes.

    Args:
        factorization: "standard" or "loralib".

    Input shape: `(batch, depth, height, width, channels)`, or with channels
    second and data_format="channels_first". Output shape: the same with filters.

    Examples:
        >>> layer = LoRAConv3D(16, 3, padding="same", rank=2)
        >>> tuple(layer(keras.ops.ones((2, 5, 5, 5, 4))).shape)
        (2, 5, 5, 5, 16)
    """  # noqa: E501

    plain_class = keras.layers.Conv3D


def to_file(a, b):
    """Returns A and B as torch's two convolutions: (r, in, *k), (out, r, 1, ...)."""
    a = np.moveaxis(a, (-1, -2), (0, 1))
    return a, b.T.reshape(*b.T.shape, *[1] * (a.ndim - 2))


def from_file(a, b):
    return np.moveaxis(a, (0, 1), (-1, -2)), b.reshape(b.shape[:2]).T


def down(layer, inputs, a):
    """Convolves inputs with A, to rank channels."""
    if layer.groups > 1:
        # All groups share A.
        a = ops.tile(a, (1,) * (len(a.shape) - 1) + (layer.groups,))
    if as_products(layer) and set(layer.kernel_size + layer.strides) == {1}:
        return ops.matmul(inputs, ops.reshape(a, a.shape[-2:]))
    if a.shape[-1] == 1 and keras.backend.backend() == "torch":
        # On a CPU, torch's convolution has no gradient for one row and one filter.
        axis = -1 if layer.data_format == "channels_last" else 1
        both = layer.linear(inputs, ops.repeat(a, 2, axis=-1))
        return ops.take(both, [0], axis=axis)
    return layer.linear(inputs, a)


def up(layer, hidden, b):
    """Convolves with B as a 1x1 kernel, from rank channels to the filters."""
    if as_products(layer):
        return ops.matmul(hidden, b)
    return ops.conv(
        hidden,
        ops.reshape(b, (1,) * layer.rank + tuple(b.shape)),
        padding="valid",
        data_format=layer.data_format,
    )


def as_products(layer):
    """Whether a 1x1 convolution can be a matrix product, which is faster on a CPU."""
    return layer.groups == 1 and layer.data_format == "channels_last"
