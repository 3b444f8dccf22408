"""How an einsum layer's quantized kernel is read."""

import math

from keras import ops

from keras_lora.keras_internals.callers import warn_caller
from keras_lora.layers.equation import split_equation
from keras_lora.layers.quantized_host import CALIBRATED
from keras_lora.layers.quantized_host import dequantize
from keras_lora.layers.quantized_host import quantization


class QuantizedEinsum:
    """Mixin of LoRAEinsumDense: what `QuantizedHost` asks of a kind."""

    equation: str
    name: str
    quantization_mode: str | None

    def linear_back(self, upstream, kernel):
        return ops.einsum(split_equation(self.equation).back, upstream, kernel)

    def warn_of_quantization(self):
        split = split_equation(self.equation)
        mode = self.quantization_mode
        first = split.kernel.startswith(split.contracted)
        if mode in CALIBRATED:  # where the largest axis tells the inputs' from others
            axes = split.axes(split.contracted)
            inputs = math.prod(self.kernel_shape[axis] for axis in axes)
            first = first and self.g_idx.shape[0] == inputs
        scale, zero, _ = quantization(self, "kernel")
        if not first and not self.scales_outputs(scale, zero):
            warn_caller(
                f"The {mode} kernel of {self.name!r} has a large error: Keras "
                f"quantizes it along axes over which {self.equation!r} does not sum. "
                "Its error is several times that of a Dense kernel. Use int8 for this "
                "layer, or leave it in float (`filters` of `Model.quantize`)."
            )

    def scales_outputs(self, scale, zero):
        """Whether a scale lies as the outputs do: int8, and int4 in Keras 3.12."""
        return zero is None and (self.quantization_mode == "int8" or scale.ndim > 1)

    def from_integers(self, integers, scale, zero, groups):
        if self.scales_outputs(scale, zero):
            split = split_equation(self.equation)
            scale = split.over_kernel(scale, integers.shape)
            return dequantize(integers, scale)
        # Keras reshapes the kernel to a matrix, whichever axes come first.
        matrix = ops.reshape(integers, (-1, scale.shape[-1]))
        values = dequantize(matrix, scale, zero, groups)
        return ops.reshape(values, integers.shape)
