"""The token embedding that is also the output head of a language model."""

import keras
from keras import ops

from keras_lora.keras_internals import set_mask
from keras_lora.layers.embedding import LoRAEmbedding


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
    no update reaches. At the start the layer equals
    `keras.layers.ReversibleEmbedding`, whose arguments it takes.

    Input shape: ids `(...)`, or `(..., output_dim)` with reverse=True. Output
    shape: `(..., output_dim)`, or `(..., input_dim)` with reverse=True.
    """

    plain_class = keras.layers.ReversibleEmbedding

    def call(self, inputs, reverse=False, training=None):
        if self.lora is None or (reverse and not self.tie_weights):
            return keras.layers.ReversibleEmbedding.call(self, inputs, reverse)
        if not reverse:
            outputs = super().call(inputs, training)
            mask = keras.layers.Embedding.compute_mask(self, inputs)
            if mask is not None:
                set_mask(outputs, mask)
            return outputs
        low_rank = False
        if self._fixed_kernel is not None:  # inside merged() or disabled()
            table = self._fixed_kernel.kernel
        elif training or not self.merge_weights:
            table, low_rank = ops.stop_gradient(self.embeddings), True
        else:
            table = self.merged_kernel(self.variable_dtype)
        table = ops.cast(table, self.compute_dtype)
        if self.reverse_dtype is not None:
            inputs = ops.cast(inputs, self.reverse_dtype)
            table = ops.cast(table, self.reverse_dtype)
        logits = ops.matmul(inputs, ops.transpose(table))
        if low_rank:
            a, b = self.lora.factors(keras.backend.standardize_dtype(logits.dtype))
            hidden = ops.matmul(inputs, ops.transpose(b))
            logits = ops.add(logits, ops.matmul(hidden, ops.transpose(a)))
        if self.logit_soft_cap is not None:
            cap = self.logit_soft_cap
            logits = ops.multiply(ops.tanh(ops.divide(logits, cap)), cap)
        return logits

    def compute_output_spec(self, inputs, reverse=False, training=None):
        return keras.layers.ReversibleEmbedding.compute_output_spec(
            self, inputs, reverse
        )
