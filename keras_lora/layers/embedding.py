"""LoRAEmbedding: only the rows that are looked up are ever touched."""

import keras
from keras import ops

from keras_lora.layers.adapter import LowRankForm
from keras_lora.layers.lora_layer import LoRALayer


@keras.saving.register_keras_serializable(package="keras_lora")
class LoRAEmbedding(LoRALayer, keras.layers.Embedding):
    """Embedding layer with a frozen table and a trainable low-rank update.

        y = W[ids] + A[ids] @ (scaling * B)        in training and inference alike

        W   (input_dim, output_dim)   frozen
        A   (input_dim, rank)         starts as 0
        B   (rank, output_dim)        starts as N(0, 1)

    Here A is the zero factor: a row of A is trained only when its id occurs, and
    a zero row leaves the row of W as it is. At the start the layer equals
    `keras.layers.Embedding`, whose arguments it takes. The rows are added in
    float32 and rounded once: the call is merged, for the looked-up rows alone, so
    `merge_weights` makes no difference. There is no dropout, as the adapter's
    inputs are ids (nor is there in LoRA's own code and in PEFT).

    Input shape: `(...)` of whole numbers. Output shape: `(..., output_dim)`.

    Example:

    >>> layer = LoRAEmbedding(1000, 64, mask_zero=True, rank=4)
    >>> layer(keras.ops.ones((2, 10), "int32")).shape
    (2, 10, 64)
    """

    plain_class = keras.layers.Embedding
    kernel_name = "embeddings"

    def __init__(
        self,
        input_dim,
        output_dim,
        embeddings_initializer="uniform",
        embeddings_regularizer=None,
        embeddings_constraint=None,
        mask_zero=False,
        weights=None,
        **kwargs,
    ):
        super().__init__(
            input_dim,
            output_dim,
            embeddings_initializer=embeddings_initializer,
            embeddings_regularizer=embeddings_regularizer,
            embeddings_constraint=embeddings_constraint,
            mask_zero=mask_zero,
            **kwargs,
        )
        if self.lora is not None and self.lora.dropout > 0:
            raise ValueError(
                "`dropout` must be 0 for LoRAEmbedding: the adapter's inputs are "
                f"ids. Received: dropout={self.lora.dropout}."
            )
        # Keras builds the layer inside its constructor when it is given weights;
        # the adapter has to exist before that.
        if weights is not None:
            self.build()
            table = weights[0] if isinstance(weights, list) else weights
            self.embeddings.assign(table)

    def build(self, input_shape=None):
        if not self.built:
            super().build(input_shape)

    def linear(self, inputs, kernel):
        return ops.take(kernel, inputs, axis=0)

    def low_rank_form(self, rank):
        return LowRankForm(
            a_shape=(self.input_dim, rank),
            b_shape=(rank, self.output_dim),
            fan_in=self.input_dim,
            compose=ops.matmul,
            bypass=lambda inputs, a, b: ops.matmul(ops.take(a, inputs, axis=0), b),
            a_initializer="zeros",
            b_initializer=keras.initializers.RandomNormal(mean=0.0, stddev=1.0),
        )

    def call(self, inputs, training=None):
        if self.lora is None:
            return super().call(inputs)
        if inputs.dtype not in ("int32", "int64"):
            inputs = ops.cast(inputs, "int32")
        if hasattr(inputs, "with_flat_values"):  # TensorFlow's ragged ids
            return inputs.with_flat_values(self.call(inputs.flat_values, training))
        dtype = self.lora.variable_dtype
        # Looked up first and cast after: a cast would touch the whole table.
        if self._fixed_kernel is not None:  # inside merged() or disabled()
            outputs = self.linear(inputs, self._fixed_kernel.kernel)
        else:
            rows = ops.stop_gradient(self.linear(inputs, self.embeddings))
            outputs = ops.add(
                ops.cast(rows, dtype), self.lora.bypass(inputs, dtype, training)
            )
        return ops.cast(outputs, self.compute_dtype)

    def compute_output_spec(self, inputs, training=None):
        return super().compute_output_spec(inputs)
