"""LoRAConv1D, LoRAConv2D, LoRAConv3D: one mixin, three documented faces."""

import math
import types

import keras
from keras import ops

from keras_lora.layers.adapter import LowRankForm
from keras_lora.layers.lora_layer import LoRALayer
from keras_lora.layers.small_kernel_training import in_tensorflow_graph
from keras_lora.layers.small_kernel_training import merged_in_training


class LoRAConv(LoRALayer):
    """What the three convolutions share. `self.rank` is Keras's: spatial axes."""

    own_attributes = types.MappingProxyType(
        {**LoRALayer.own_attributes, "factorization": "standard"}
    )

    def __init__(self, *args, factorization="standard", **kwargs):
        super().__init__(*args, **kwargs)
        if factorization not in ("standard", "loralib"):
            raise ValueError(
                '`factorization` must be "standard" (a convolution to rank channels, '
                'then 1x1) or "loralib" (the shapes of microsoft/LoRA). Received: '
                f"factorization={factorization!r}."
            )
        self.factorization = factorization

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

    def low_rank_path(self, inputs, dtype, training):
        if not (training and self._merging_pays(inputs, dtype)):
            return super().low_rank_path(inputs, dtype, training)
        kernel = ops.cast(self.kernel, dtype)
        factors = self.lora.factors(dtype)
        return merged_in_training(self.linear, self.lora.form, inputs, kernel, *factors)

    def _merging_pays(self, inputs, dtype):
        """Whether a step is compiled by TensorFlow, exact, and its kernel small.

        On a CPU a convolution to few channels takes far longer than its arithmetic
        says, and W + delta is no more memory than one more copy of the inputs.
        """
        sizes = [size or 16 for size in inputs.shape]  # 16 where it is not known
        return (
            self.merge_weights
            and in_tensorflow_graph()
            and self.lora.dropout == 0  # it drops inputs of the adapter alone
            and dtype == self.lora.variable_dtype  # rounding would swallow updates
            and math.prod(self.kernel.shape) <= math.prod(sizes)
        )

    def low_rank_form(self, rank):
        if self.factorization == "loralib":
            return self._loralib_form(rank)
        *window, filters = self.kernel.shape  # (*k, channels / groups, filters)
        return LowRankForm(
            a_shape=(*window, rank),
            b_shape=(rank, filters),
            fan_in=math.prod(window),
            compose=lambda a, b: ops.tensordot(a, b, axes=1),
            bypass=self._bypass,
        )

    def _bypass(self, inputs, a, b):
        if self.groups > 1:
            # Every group of channels goes through the same A.
            a = ops.tile(a, (1,) * (len(a.shape) - 1) + (self.groups,))
        # A 1x1 convolution is a product, which is faster on a CPU.
        products = self.groups == 1 and self.data_format == "channels_last"
        if products and set(self.kernel_size + self.strides) == {1}:
            hidden = ops.matmul(inputs, ops.reshape(a, a.shape[-2:]))
        else:
            hidden = self.linear(inputs, a)
        if products:
            return ops.matmul(hidden, b)
        return ops.conv(
            hidden,
            ops.reshape(b, (1,) * self.rank + tuple(b.shape)),
            padding="valid",
            data_format=self.data_format,
        )

    def _loralib_form(self, rank):
        *kernel_size, group_channels, filters = self.kernel.shape
        last, others = kernel_size[-1], math.prod(kernel_size[:-1])
        channels = group_channels * self.groups

        def compose(a, b):
            # microsoft/LoRA: (B @ A).view(filters, channels/groups, *kernel_size)
            shape = (filters, group_channels, *kernel_size)
            product = ops.reshape(ops.matmul(b, a), shape)
            return ops.transpose(product, (*range(2, len(shape)), 1, 0))

        return LowRankForm(
            a_shape=(rank * last, channels * last),
            b_shape=(filters // self.groups * others, rank * last),
            fan_in=channels * last,
            compose=compose,
            # Its reshape mixes channels with positions: no cheaper path exists.
            bypass=lambda inputs, a, b: self.linear(inputs, compose(a, b)),
        )

    def finish(self, outputs):
        if self.bias is not None:
            shape = [1] * (self.rank + 2)
            shape[-1 if self.data_format == "channels_last" else 1] = self.filters
            outputs = ops.add(outputs, ops.reshape(self.bias, shape))
        if self.activation is not None:
            outputs = self.activation(outputs)
        return outputs

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

    The groups share A. With `factorization="loralib"`, for files and numbers of
    microsoft/LoRA, delta = scaling * (B @ A) reshaped to the kernel, with

        A   (rank * k, channels * k)            starts as U(±1/sqrt(channels * k))
        B   (filters/groups, rank * k)          starts as 0

    whose rank is up to rank * k, and which forms delta while training too. At
    the start B = 0, and the layer equals `keras.layers.Conv1D`, whose arguments
    it takes, `padding="causal"` among them.

    Args:
        factorization: "standard" or "loralib".

    Input shape: `(batch, steps, channels)`, or `(batch, channels, steps)` with
    data_format="channels_first". Output shape: the same with filters.

    Example:

    >>> layer = LoRAConv1D(32, 3, padding="causal", rank=4)
    >>> layer(keras.ops.ones((2, 20, 8))).shape
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

    The groups share A. With `factorization="loralib"`, for files and numbers of
    microsoft/LoRA, delta = scaling * (B @ A) reshaped to the kernel, with

        A   (rank * w, channels * w)           starts as U(±1/sqrt(channels * w))
        B   (filters/groups * h, rank * w)     starts as 0

    whose rank is up to rank * h * w, and which forms delta while training too. At
    the start B = 0, and the layer equals `keras.layers.Conv2D`, whose arguments
    it takes.

    Args:
        factorization: "standard" or "loralib".

    Input shape: `(batch, height, width, channels)`, or with channels second and
    data_format="channels_first". Output shape: the same with filters.

    Example:

    >>> layer = LoRAConv2D(32, 3, strides=2, rank=4)
    >>> layer(keras.ops.ones((2, 9, 9, 8))).shape
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

    The groups share A. With `factorization="loralib"`, delta = scaling * (B @ A)
    reshaped to the kernel, in the shapes of microsoft/LoRA pull request 157:

        A   (rank * k3, channels * k3)               starts as U(±1/sqrt(channels * k3))
        B   (filters/groups * k1 * k2, rank * k3)    starts as 0

    whose rank is up to rank * k1 * k2 * k3, and which forms delta while training
    too. At the start B = 0, and the layer equals `keras.layers.Conv3D`, whose
    arguments it takes.

    Args:
        factorization: "standard" or "loralib".

    Input shape: `(batch, depth, height, width, channels)`, or with channels
    second and data_format="channels_first". Output shape: the same with filters.

    Example:

    >>> layer = LoRAConv3D(16, 3, padding="same", rank=2)
    >>> layer(keras.ops.ones((2, 5, 5, 5, 4))).shape
    (2, 5, 5, 5, 16)
    """  # noqa: E501

    plain_class = keras.layers.Conv3D
