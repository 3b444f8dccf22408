"""LoRAEmbedding, which touches only the rows that are looked up."""

import keras
from keras import ops

from keras_lora.keras_internals import classes, layer_state
from keras_lora.layers import form, quantized_host, torch_layout
from keras_lora.layers.form import LowRankForm
from keras_lora.layers.lora_layer import LoRALayer


@keras.saving.register_keras_serializable(package="keras_lora")
class LoRAEmbedding(LoRALayer, keras.layers.Embedding):
    """Embedding layer with a frozen table and a trainable low-rank update.

        y = W[ids] + A[ids] @ (scaling * B)        in training and inference alike

        W   (input_dim, output_dim)   frozen
        A   (input_dim, rank)         starts as 0
        B   (rank, output_dim)        starts as N(0, 1)

    A starts as zero here, because a row of A trains only when its id occurs, and a zero
    row leaves the row of W as it is. At the start the layer equals
    `keras.layers.Embedding`, whose arguments it takes. Only the looked-up rows are
    added, in float32, and rounded once. At inference, W + delta is formed if at least
    as many ids are looked up as the table has rows, unless `merge_weights` is False.
    There is no dropout, because the adapter's inputs are ids (as in LoRA's own code
    and in PEFT).

    Input shape: `(...)` of whole numbers. Output shape: `(..., output_dim)`.

    Examples:
        >>> layer = LoRAEmbedding(1000, 64, mask_zero=True, rank=4)
        >>> tuple(layer(keras.ops.ones((2, 10), "int32")).shape)
        (2, 10, 64)
    """

    plain_class = keras.layers.Embedding
    kernel_name = "embeddings"
    in_all_linear = False
    takes_dropout = False
    file_suffixes = torch_layout.EMBEDDING

    def build(self, input_shape=None):
        if not self.built:
            super().build(input_shape)

    def linear(self, inputs, kernel):
        if inputs.dtype not in ("int32", "int64"):
            inputs = ops.cast(inputs, "int32")
        return ops.take(kernel, inputs, axis=0)

    # Cast after the lookup: a cast of the table would touch all of it.

    def frozen_linear(self, inputs):
        if self.is_quantized:
            return self.quantized_linear(inputs)
        return ops.stop_gradient(self.linear(inputs, self.frozen_kernel))

    def quantized_linear(self, inputs):
        if quantized_host.in_artifact():
            return classes.view_with(self, self.plain_class, {}).quantized_call(inputs)
        ids = ops.reshape(ops.cast(inputs, "int32"), (-1,))
        rows = {
            name: ops.take(variable, ids, axis=0)
            for name, variable in layer_state.kernel_variables(self).items()
            if name.strip("_").startswith(self.kernel_name)
        }
        plain = classes.view_with(self, self.plain_class, rows)
        outputs = plain.quantized_call(ops.arange(ops.shape(ids)[0]))
        shape = (*ops.shape(inputs), self.output_dim)
        return ops.stop_gradient(ops.reshape(outputs, shape))

    def from_integers(self, integers, scale, zero, groups):
        scale = ops.expand_dims(scale, -1) if zero is None else scale
        return quantized_host.dequantize(integers, scale, zero, groups, axis=1)

    def apply_kernel(self, inputs, kernel):
        return self.linear(inputs, kernel)

    def finish(self, outputs):
        return ops.cast(outputs, self.compute_dtype)

    def low_rank_form(self, rank):
        return LowRankForm(
            a_shape=(self.input_dim, rank),
            b_shape=(rank, self.output_dim),
            fan_in=self.input_dim,
            compose=ops.matmul,
            down=self.linear,
            up=ops.matmul,
            down_by_row=form.take_by_row,
            up_by_row=form.matmul_by_row,
            a_initializer="zeros",
            b_initializer=keras.initializers.RandomNormal(mean=0.0, stddev=1.0),
            looks_up=True,
        )

    @classmethod
    def weight_to_file(cls, layer, kernel, inputs_first=False):
        return kernel

    weight_from_file = weight_to_file

    def compute_output_spec(self, inputs, training=None):
        return super().compute_output_spec(inputs)
