"""A token embedding as the output head of its language model."""

from keras import ops

from keras_lora.layers.by_row import matmul_by_row
from keras_lora.layers.form import LowRankForm
from keras_lora.layers.quantized_host import straight_through


class ReverseForm(LowRankForm):
    """(A @ B).T: B leads down to the rank, and A up to the ids."""

    def bypass(self, inputs, a, b):
        return self.up(self.down(inputs, b), a)

    def bypass_by_row(self, inputs, a, b, slots, training=False):
        return self.up_by_row(self.down_by_row(inputs, b, slots), a, slots)


class ReverseSide:
    """The layer as the adapter works on it from outputs back to ids."""

    def __init__(self, layer):
        self.layer = layer
        self.merges_in_call = layer.merges_in_call
        # Keras's quantized call knows no `reverse_dtype`.
        own = None if layer.is_quantized else layer.reverse_dtype
        self.compute_dtype = own or layer.compute_dtype
        self.base_kernel = layer.base_kernel

    @property
    def form(self):
        form = self.layer.form
        return ReverseForm(
            a_shape=form.a_shape,
            b_shape=form.b_shape,
            fan_in=self.layer.output_dim,
            compose=form.compose,
            down=self.linear,
            up=self.linear,
            down_by_row=self._by_row,
            up_by_row=self._by_row,
            input_axes=(1,),
        )

    def linear(self, inputs, kernel):
        inputs = ops.cast(inputs, self.compute_dtype)
        return ops.matmul(inputs, ops.transpose(kernel))

    def _by_row(self, inputs, stack, slots):
        inputs = ops.cast(inputs, self.compute_dtype)
        return matmul_by_row(inputs, stack, slots, transpose=True)

    def frozen_linear(self, inputs):
        if self.layer.is_quantized:
            return straight_through(
                self.layer,
                inputs,
                lambda plain, inputs: plain.quantized_call(inputs, reverse=True),
                lambda own, upstream: ops.matmul(
                    upstream, ops.transpose(own.reverse_kernel(upstream.dtype))
                ),
            )
        kernel = self.base_kernel(self.layer.compute_dtype)
        return self.apply_kernel(inputs, ops.stop_gradient(kernel))

    def apply_kernel(self, inputs, kernel):
        kernel = ops.cast(kernel, self.layer.compute_dtype)  # as the plain layer does
        return self.linear(inputs, ops.cast(kernel, self.compute_dtype))

    def finish(self, logits):
        cap = self.layer.logit_soft_cap
        if cap is None:
            return logits
        return ops.multiply(ops.tanh(ops.divide(logits, cap)), cap)
