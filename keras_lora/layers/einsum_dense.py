"""LoRAEinsumDense: the projections of attention."""

import math

import keras
import numpy as np
from keras import ops

from keras_lora.layers.by_row import einsum_by_row
from keras_lora.layers.equation import as_matrix
from keras_lora.layers.equation import split_equation
from keras_lora.layers.form import LowRankForm
from keras_lora.layers.form import gradient_of_matrix
from keras_lora.layers.form import merging_size
from keras_lora.layers.form import unchanged
from keras_lora.layers.lora_layer import LoRALayer
from keras_lora.layers.quantized_einsum import QuantizedEinsum


@keras.saving.register_keras_serializable(package="keras_lora")
class LoRAEinsumDense(QuantizedEinsum, LoRALayer, keras.layers.EinsumDense):
    """EinsumDense layer with a frozen kernel and an update of true rank r.

    The equation splits the kernel's axes: those summed over with the input are
    contracted, those found in the output alone are new. For a query projection
    `"abc,cde->abde"` c is contracted, d and e (heads and head size) are new, and
    all heads share one rank r:

        training=True    y = finish( einsum(x, W) + einsum(einsum(drop(x), A), scaling * B) )
        training=False   y = finish( einsum(x, W + scaling * A @ B) )

        W   as the equation says         frozen
        A   (contracted axes..., rank)   starts as U(±1/sqrt(product of these axes))
        B   (rank, new axes...)          starts as 0

    A kernel axis found in input and output alike is a batch axis: it leads both
    A and B, and each of its indices has an update of rank r.

    At the start B = 0, and the layer equals `keras.layers.EinsumDense`, whose
    arguments it takes: equation, output_shape, activation, bias_axes, ...

    Raises:
        ValueError: If the equation has no contracted or no new axis, so that
            there is nothing to factor.

    Input shape and output shape: as the equation says.

    Examples:
        >>> query = LoRAEinsumDense("abc,cde->abde", (None, 4, 16), bias_axes="de", rank=4)
        >>> tuple(query(keras.ops.ones((2, 10, 64))).shape)
        (2, 10, 4, 16)
    """  # noqa: E501

    plain_class = keras.layers.EinsumDense
    kernel_is_matrix = True

    def linear(self, inputs, kernel):
        return ops.einsum(self.equation, inputs, kernel)

    def input_rows(self, inputs):
        return split_equation(self.equation).rows(inputs)

    @classmethod
    def check_host(cls, layer):
        super().check_host(layer)
        split_equation(layer.equation)

    @classmethod
    def weight_to_file(cls, layer, kernel, inputs_first=False):
        return super().weight_to_file(layer, as_matrix(layer, kernel), inputs_first)

    @classmethod
    def weight_from_file(cls, layer, value, inputs_first=False):
        value = super().weight_from_file(layer, value, inputs_first)
        split, shape = split_equation(layer.equation), layer.kernel.shape
        if split.batch:
            return value
        axes = split.axes(split.contracted + split.new)
        return value.reshape([shape[x] for x in axes]).transpose(np.argsort(axes))

    def low_rank_form(self, rank):
        split = split_equation(self.equation)
        size = dict(zip(split.kernel, self.kernel_shape, strict=True))
        batch, contracted, new = (
            tuple(size[axis] for axis in axes)
            for axes in (split.batch, split.contracted, split.new)
        )
        # torch has no linear module with a matrix for each index of a batch axis.
        in_file = {"to_file": unchanged, "from_file": unchanged} if batch else {}
        return LowRankForm(
            a_shape=(*batch, *contracted, rank),
            b_shape=(*batch, rank, *new),
            fan_in=math.prod(contracted),
            compose=lambda a, b: ops.einsum(split.compose, a, b),
            down=lambda inputs, a: ops.einsum(split.down, inputs, a),
            up=lambda hidden, b: ops.einsum(split.up, hidden, b),
            down_by_row=self._down_by_row,
            up_by_row=self._up_by_row,
            input_axes=split.axes(split.contracted),
            batch_axes=split.axes(split.batch),
            over_outputs=split.over_outputs,
            merges_from=merging_size(
                math.prod(self.kernel_shape), math.prod(contracted), math.prod(new)
            ),
            gradient_of_a=self._gradient_of_a if split.keeps_order else None,
            **in_file,
        )

    def _gradient_of_a(self, inputs, of_hidden):
        matrix = gradient_of_matrix(self.input_rows(inputs), of_hidden)
        return ops.reshape(matrix, (*self.lora.form.a_shape[:-1], -1))

    def _down_by_row(self, inputs, a, slots):
        down, _, row = split_equation(self.equation).by_row(len(inputs.shape))
        return einsum_by_row(down, row, inputs, a, slots)

    def _up_by_row(self, hidden, b, slots):
        split = split_equation(self.equation)
        # The inputs have the contracted axes more, and not that of the rank.
        ndim = len(hidden.shape) - 1 + len(split.contracted)
        _, up, row = split.by_row(ndim)
        return einsum_by_row(up, row, hidden, b, slots)
