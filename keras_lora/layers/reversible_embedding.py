"""The token embedding that is also the output head of a language model."""

import keras
from keras import ops

from keras_lora.keras_internals.calls import set_mask
from keras_lora.keras_internals.classes import call_with
from keras_lora.keras_internals.private_names import MASKS
from keras_lora.keras_internals.private_names import require
from keras_lora.layers.embedding import LoRAEmbedding
from keras_lora.layers.quantized_host import dequantize
from keras_lora.layers.quantized_host import quantization
from keras_lora.layers.reverse_side import ReverseSide
from keras_lora.layers.substituted import WeightSite


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

    With `tie_weights=False` the reverse direction has a kernel of its own, which
    `apply_lora` can adapt by its name, "token_embedding/reverse_embeddings". At the
    start the layer equals
    `keras.layers.ReversibleEmbedding`, whose arguments it takes.

    Input shape: ids `(...)`, or `(..., output_dim)` with reverse=True. Output
    shape: `(..., output_dim)`, or `(..., input_dim)` with reverse=True.
    """

    plain_class = keras.layers.ReversibleEmbedding
    more_weights = ("reverse_embeddings",)
    mends_gradient = True  # that of int8 goes through `round`

    @classmethod
    def check_host(cls, layer):
        super().check_host(layer)
        require(MASKS)

    def call(self, inputs, reverse=False, training=None):
        outputs = self.adapted_call(inputs, training, reverse=reverse)
        if not reverse and not self.is_quantized:  # Keras drops it there
            mask = keras.layers.Embedding.compute_mask(self, inputs)
            if mask is not None:
                set_mask(outputs, mask)
        return outputs

    def host(self, reverse=False):
        if not reverse:
            return self
        return ReverseSide(self) if self.tie_weights else None

    def sites(self):
        """Also the head's, where it is not tied."""
        (name,) = self.more_weights
        head = WeightSite(self, name, (name,), type(self))
        return super().sites() | ({name: head} if head.lora is not None else {})

    def plain_call(self, inputs, reverse=False):
        head = self.sites().get(*self.more_weights) if reverse else None
        if head is not None:
            kernel = {head.kernel_keys: head.kernel_in_call()}
            return call_with(
                self, self.plain_class, kernel, (inputs,), {"reverse": True}
            )
        if not (reverse and self.is_quantized):
            return super().plain_call(inputs, reverse=reverse)
        side = ReverseSide(self)
        return side.finish(side.frozen_linear(inputs))

    def other_kernels(self):
        if self.tie_weights:
            return {}
        name, integers = "reverse_embeddings", self.reverse_embeddings
        if self.quantization_mode == "int4":
            integers = keras.quantizers.unpack_int4(integers, self.output_dim, axis=0)
        return {name: dequantize(integers, *quantization(self, name))}

    def reverse_kernel(self, dtype):
        """What the reverse direction multiplies with, as its operation means it."""
        for kernel in self.other_kernels().values():
            return ops.cast(kernel, dtype)
        return ops.transpose(self.base_kernel(dtype))

    def compute_output_spec(self, inputs, reverse=False, training=None):
        return keras.layers.ReversibleEmbedding.compute_output_spec(
            self, inputs, reverse
        )
