"""LoRAReversibleEmbedding: a token embedding that is also the output head."""

import keras
from keras import ops

from keras_lora.keras_internals import calls, classes, private_names, probes
from keras_lora.layers import quantized_host
from keras_lora.layers.embedding import LoRAEmbedding
from keras_lora.layers.form import LowRankForm, matmul_by_row
from keras_lora.layers.substituted import WeightSite


class ReverseForm(LowRankForm):
    """The form of (A @ B).T: B maps down to the rank, and A up to the ids."""

    def bypass(self, inputs, a, b):
        return self.up(self.down(inputs, b), a)

    def bypass_by_row(self, inputs, a, b, slots, training=False):
        return self.up_by_row(self.down_by_row(inputs, b, slots), a, slots)


class ReverseSide:
    """The layer in the reverse direction, as its adapter's host."""

    def __init__(self, layer, inputs):
        self.layer = layer
        self.merges_in_call = layer.merges_in_call
        self.compute_dtype = layer.compute_dtype
        if not layer.is_quantized:  # Keras's quantized call ignores `reverse_dtype`
            # Keras does not cast the inputs of an embedding.
            both = keras.backend.result_type(inputs.dtype, layer.compute_dtype)
            self.compute_dtype = layer.reverse_dtype or both
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
            return quantized_host.straight_through(
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


@keras.saving.register_keras_serializable(package="keras_lora")
class LoRAReversibleEmbedding(LoRAEmbedding, keras.layers.ReversibleEmbedding):
    """ReversibleEmbedding with one low-rank update for both directions.

        forward          y = W[ids] + A[ids] @ (scaling * B)
        reverse
          training=True    y = x @ W.T + (x @ (scaling * B).T) @ A.T
          training=False   y = x @ (W + scaling * A @ B).T

        W   (input_dim, output_dim)   frozen
        A   (input_dim, rank)         starts as 0
        B   (rank, output_dim)        starts as N(0, 1)

    With `tie_weights=False`, the reverse direction has its own kernel, which
    `apply_lora` can adapt by its name, "token_embedding/reverse_embeddings". At the
    start the layer equals `keras.layers.ReversibleEmbedding`, whose arguments it takes.

    Input shape: ids `(...)`, or `(..., output_dim)` with reverse=True. Output
    shape: `(..., output_dim)`, or `(..., input_dim)` with reverse=True.
    """

    plain_class = keras.layers.ReversibleEmbedding
    more_weights = ("reverse_embeddings",)
    mends_gradient = True  # Keras's for int8 goes through `round`

    @classmethod
    def check_host(cls, layer):
        super().check_host(layer)
        probes.require(private_names.MASKS)

    def call(self, inputs, reverse=False, training=None):
        outputs = self.call_with_adapter(inputs, training, reverse=reverse)
        if not reverse and not self.is_quantized:  # then Keras has no mask
            mask = keras.layers.Embedding.compute_mask(self, inputs)
            if mask is not None:
                calls.set_mask(outputs, mask)
        return outputs

    def host(self, inputs, reverse=False):
        if not reverse:
            return self
        return ReverseSide(self, inputs) if self.tie_weights else None

    def sites(self):
        """Also the site of an untied head."""
        (name,) = self.more_weights
        head = WeightSite(self, name, (name,), type(self))
        return super().sites() | ({name: head} if head.lora is not None else {})

    def plain_call(self, inputs, reverse=False):
        head = self.sites().get(*self.more_weights) if reverse else None
        if head is not None:
            kernel = {head.kernel_keys: head.kernel_in_call()}
            return classes.call_with(
                self, self.plain_class, kernel, (inputs,), {"reverse": True}
            )
        if not (reverse and self.is_quantized):
            return super().plain_call(inputs, reverse=reverse)
        side = ReverseSide(self, inputs)
        return side.finish(side.frozen_linear(inputs))

    def other_kernels(self):
        if self.tie_weights:
            return {}
        name, integers = "reverse_embeddings", self.reverse_embeddings
        if self.quantization_mode == "int4":
            integers = keras.quantizers.unpack_int4(integers, self.output_dim, axis=0)
        return {
            name: quantized_host.dequantize(
                integers, *quantized_host.quantization(self, name)
            )
        }

    def reverse_kernel(self, dtype):
        """Returns the kernel (dim, vocabulary) of the reverse direction."""
        for kernel in self.other_kernels().values():
            return ops.cast(kernel, dtype)
        return ops.transpose(self.base_kernel(dtype))

    def compute_output_spec(self, inputs, reverse=False, training=None):
        return keras.layers.ReversibleEmbedding.compute_output_spec(
            self, inputs, reverse
        )
