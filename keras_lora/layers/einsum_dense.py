"""LoRAEinsumDense, and the meaning of W's axes in its equation."""

import math
import string
from typing import NamedTuple

import keras
from keras import ops

from keras_lora.keras_internals import classes, warn_caller
from keras_lora.layers import form, quantized_host
from keras_lora.layers.form import LowRankForm
from keras_lora.layers.lora_layer import LoRALayer


class SplitEquation(NamedTuple):
    """The kernel axes of an equation by their use, and the low-rank equations."""

    inputs: str
    kernel: str
    batch: str
    contracted: str
    new: str
    down: str  # inputs, A -> hidden
    up: str  # hidden, B -> outputs
    compose: str  # A, B -> kernel
    outputs: str
    back: str  # gradient of outputs, kernel -> gradient of inputs

    def axes(self, letters):
        """Returns the positions of these axes in the kernel."""
        return tuple(map(self.kernel.index, letters))

    def over_outputs(self, value):
        """Lays out a value with the kernel's batch and new axes like the outputs."""
        own = [axis for axis in self.kernel if axis not in self.contracted]
        lead, _, trail = self.outputs.rpartition("...")
        if any(axis in lead for axis in own):
            raise ValueError(
                f"The kernel's output axes come before '...' in {self.outputs!r}."
            )
        value = ops.transpose(value, [own.index(axis) for axis in trail if axis in own])
        for place, axis in enumerate(trail):
            if axis not in own:
                value = ops.expand_dims(value, place)
        return value

    def rows(self, inputs):
        """Inputs as (n, all contracted axes); None if the kernel is a stack."""
        if self.batch:
            return None
        own = self.inputs.replace("...", "")
        places = [own.index(axis) for axis in self.contracted]
        if "..." in self.inputs:
            first = self.inputs.index("...")
            more = len(inputs.shape) - len(own)
            places = [place + more * (place >= first) for place in places]
        others = [place for place in range(len(inputs.shape)) if place not in places]
        size = math.prod(inputs.shape[place] for place in places)
        return ops.reshape(ops.transpose(inputs, others + places), (-1, size))

    @property
    def keeps_order(self):
        """Whether outputs have the inputs' other axes in order, then the new ones."""
        others = "".join(axis for axis in self.inputs if axis not in self.contracted)
        return not self.batch and self.outputs.startswith(others)

    def by_row(self, ndim):
        """Returns (down, up, letter of the rows), with letters instead of "..."."""
        free = (x for x in string.ascii_letters if x not in self.down + self.up)
        inputs = self.down.partition(",")[0]
        others = "".join(next(free) for _ in range(ndim - len(inputs) + 3))
        down, up = (x.replace("...", others) for x in (self.down, self.up))
        row = down[0]
        if row in self.kernel:
            raise ValueError(
                f"The first axis of the inputs in {self.down!r} is also an axis of the "
                "kernel, so rows cannot have their own adapters."
            )
        return down, up, row

    def over_kernel(self, value, sizes):
        """Reshapes a value laid out like the outputs so that it can multiply W."""
        size = dict(zip(self.kernel, sizes, strict=True))
        axes = [axis for axis in self.outputs if axis in self.kernel]
        value = ops.reshape(value, [size[axis] for axis in axes])
        order = [axes.index(axis) for axis in self.kernel if axis in axes]
        value = ops.transpose(value, order)
        for place in sorted(self.axes(self.contracted)):
            value = ops.expand_dims(value, place)
        return value


def split_equation(equation):
    """Splits "inputs,kernel->outputs" around a rank axis of its own."""
    operands, outputs = equation.replace(" ", "").split("->")
    inputs, kernel = operands.split(",")
    batch = "".join(x for x in kernel if x in inputs and x in outputs)
    contracted = "".join(x for x in kernel if x in inputs and x not in outputs)
    new = "".join(x for x in kernel if x not in inputs)
    if not contracted or not new:
        missing = "contracts no axis of" if not contracted else "gives no new axis to"
        raise ValueError(
            f"The equation {equation!r} {missing} its kernel, so a low-rank update "
            'has nothing to factor. Use rank=0, or an equation such as "abc,cd->abd".'
        )
    rank = next(x for x in "rzyxwvutsqponmlkjihgfedcbaR" if x not in equation)
    # The axes that outputs share with inputs, in order, then the rank axis.
    hidden = "".join(x for x in outputs if x not in new) + rank
    a, b = batch + contracted + rank, batch + rank + new
    return SplitEquation(
        inputs,
        kernel,
        batch,
        contracted,
        new,
        down=f"{inputs},{a}->{hidden}",
        up=f"{hidden},{b}->{outputs}",
        compose=f"{a},{b}->{kernel}",
        outputs=outputs,
        back=f"{outputs},{kernel}->{inputs}",
    )


@keras.saving.register_keras_serializable(package="keras_lora")
class LoRAEinsumDense(LoRALayer, keras.layers.EinsumDense):
    """EinsumDense layer with a frozen kernel and an update of true rank r.

    The equation splits the kernel's axes: those that are summed over are contracted,
    those that only the output has are new. In a query projection `"abc,cde->abde"`,
    c is contracted, d and e (heads and head size) are new, and all heads share one
    rank r:

        training=True    y = finish( einsum(x, W) + einsum(einsum(drop(x), A), scaling * B) )
        training=False   y = finish( einsum(x, W + scaling * A @ B) )

        W   as the equation says         frozen
        A   (contracted axes..., rank)   starts as U(±1/sqrt(product of these axes))
        B   (rank, new axes...)          starts as 0

    A kernel axis that input and output share is a batch axis. It comes first in A and
    B, and each of its indices has an update of rank r.

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
        own = classes.view_as(layer, cls).low_rank_form(1)
        kernel = kernel if own.batch_axes else own.as_matrix(kernel)
        return super().weight_to_file(layer, kernel, inputs_first)

    @classmethod
    def weight_from_file(cls, layer, value, inputs_first=False):
        value = super().weight_from_file(layer, value, inputs_first)
        own = classes.view_as(layer, cls).low_rank_form(1)
        return value if own.batch_axes else own.from_matrix(value, layer.kernel.shape)

    def low_rank_form(self, rank):
        split = split_equation(self.equation)
        size = dict(zip(split.kernel, self.kernel_shape, strict=True))
        batch, contracted, new = (
            tuple(size[axis] for axis in axes)
            for axes in (split.batch, split.contracted, split.new)
        )
        # torch has no linear module with a matrix for each index of a batch axis.
        in_file = (
            {"to_file": form.unchanged, "from_file": form.unchanged} if batch else {}
        )
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
            merges_from=form.merging_size(
                math.prod(self.kernel_shape), math.prod(contracted), math.prod(new)
            ),
            gradient_of_a=self._gradient_of_a if split.keeps_order else None,
            **in_file,
        )

    # Over a quantized kernel.

    def linear_back(self, upstream, kernel):
        return ops.einsum(split_equation(self.equation).back, upstream, kernel)

    def warn_of_quantization(self):
        split = split_equation(self.equation)
        mode = self.quantization_mode
        first = split.kernel.startswith(split.contracted)
        if (
            mode in quantized_host.CALIBRATED
        ):  # where the largest axis tells the inputs' from others
            axes = split.axes(split.contracted)
            inputs = math.prod(self.kernel_shape[axis] for axis in axes)
            first = first and self.g_idx.shape[0] == inputs
        scale, zero, _ = quantized_host.quantization(self, "kernel")
        if not first and not self.scales_outputs(scale, zero):
            warn_caller(
                f"The {mode} kernel of {self.name!r} has a large error: Keras "
                f"quantizes it along axes over which {self.equation!r} does not sum. "
                "Its error is several times that of a Dense kernel. Use int8 for this "
                "layer, or leave it in float (`filters` of `Model.quantize`)."
            )

    def scales_outputs(self, scale, zero):
        """Whether a scale has the outputs' layout: int8, and int4 in Keras 3.12."""
        return zero is None and (self.quantization_mode == "int8" or scale.ndim > 1)

    def from_integers(self, integers, scale, zero, groups):
        if self.scales_outputs(scale, zero):
            split = split_equation(self.equation)
            scale = split.over_kernel(scale, integers.shape)
            return quantized_host.dequantize(integers, scale)
        # Keras reshapes the kernel to a matrix without reordering its axes.
        matrix = ops.reshape(integers, (-1, scale.shape[-1]))
        values = quantized_host.dequantize(matrix, scale, zero, groups)
        return ops.reshape(values, integers.shape)

    def _gradient_of_a(self, inputs, of_hidden):
        matrix = form.gradient_of_matrix(self.input_rows(inputs), of_hidden)
        return ops.reshape(matrix, (*self.lora.form.a_shape[:-1], -1))

    def _down_by_row(self, inputs, a, slots):
        down, _, row = split_equation(self.equation).by_row(len(inputs.shape))
        return form.einsum_by_row(down, row, inputs, a, slots)

    def _up_by_row(self, hidden, b, slots):
        split = split_equation(self.equation)
        # The inputs have the contracted axes more, and not that of the rank.
        ndim = len(hidden.shape) - 1 + len(split.contracted)
        _, up, row = split.by_row(ndim)
        return form.einsum_by_row(up, row, hidden, b, slots)
