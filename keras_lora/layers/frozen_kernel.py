"""How a LoRA layer reads its frozen kernel W, and multiplies with it."""

from keras import ops

from keras_lora.layers.quantized_host import QuantizedHost
from keras_lora.layers.quantized_host import own_kernel


class FrozenKernel(QuantizedHost):
    """Mixin of a LoRA layer: only `base_kernel` and `frozen_linear` read W."""

    plain_class: type | None
    kernel_name: str | None

    @property
    def frozen_kernel(self):
        """The variable W, under the same name for every kind."""
        if self.is_quantized:
            return own_kernel(self, self.kernel_name)
        kernel = getattr(self.plain_class, self.kernel_name, None)
        if isinstance(kernel, property):
            return kernel.fget(self)
        return getattr(self, self.kernel_name)

    @property
    def kernel_shape(self) -> tuple:
        if "kernel_shape" in vars(self):  # of Keras's Dense, in GPTQ and AWQ
            return tuple(vars(self)["kernel_shape"])
        kernel = self.kernel_values() if self.is_quantized else self.frozen_kernel
        return tuple(kernel.shape)

    @kernel_shape.setter
    def kernel_shape(self, shape):
        vars(self)["kernel_shape"] = shape

    def base_kernel(self, dtype):
        """W as a value."""
        if self.is_quantized:
            return self.dequantized(dtype)
        return ops.cast(ops.convert_to_tensor(self.frozen_kernel), dtype)

    def frozen_linear(self, inputs):
        """linear(inputs, W), without a gradient of W."""
        if self.is_quantized:
            return self.quantized_linear(inputs)
        kernel = ops.stop_gradient(self.base_kernel(self.compute_dtype))
        return self.linear(inputs, kernel)

    def apply_kernel(self, inputs, kernel):
        """linear(inputs, kernel) for a kernel of another dtype, rounded once."""
        return self.linear(inputs, ops.cast(kernel, self.compute_dtype))
