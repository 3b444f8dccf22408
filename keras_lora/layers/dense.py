"""LoRADense: the fully connected layer."""

import keras
from keras import ops

from keras_lora.layers import form, loralib
from keras_lora.layers.form import LowRankForm
from keras_lora.layers.lora_layer import LoRALayer


@keras.saving.register_keras_serializable(package="keras_lora")
class LoRADense(LoRALayer, keras.layers.Dense):
    """Dense layer with a frozen kernel and a trainable low-rank update.

        training=True    y = activation(x @ W + drop(x) @ A @ (scaling * B) + bias)
        training=False   y = activation(x @ (W + scaling * A @ B) + bias)

        W   (inputs, units)   frozen
        A   (inputs, rank)    starts as U(±1/sqrt(inputs))
        B   (rank, units)     starts as 0

    At the start B = 0, and the layer equals `keras.layers.Dense`, whose
    arguments it takes: units, activation, use_bias, initializers, regularizers.

    Input shape: `(..., inputs)`, dense or sparse. Output shape: `(..., units)`.

    Examples:
        >>> layer = LoRADense(64, activation="relu", rank=8, alpha=16, dropout=0.05)
        >>> tuple(layer(keras.ops.ones((2, 32))).shape)
        (2, 64)
    """

    plain_class = keras.layers.Dense
    kernel_is_matrix = True

    def linear(self, inputs, kernel):
        return ops.matmul(inputs, kernel)

    def input_rows(self, inputs):
        return ops.reshape(inputs, (-1, self.kernel_shape[0]))

    def low_rank_form(self, rank):
        inputs, units = self.kernel_shape
        return LowRankForm(
            a_shape=(inputs, rank),
            b_shape=(rank, units),
            fan_in=inputs,
            compose=ops.matmul,
            down=ops.matmul,
            up=ops.matmul,
            down_by_row=form.matmul_by_row,
            up_by_row=form.matmul_by_row,
            acts_on_rows=True,
            merges_from=form.merging_size(inputs * units, inputs, units),
            gradient_of_a=lambda x, of_hidden: form.gradient_of_matrix(
                self.input_rows(x), of_hidden
            ),
        )

    @classmethod
    def read_loralib(cls, layer, a, b, rank, mask, module):
        return loralib.convert_merged_linear(layer, a, b, rank, mask, module)
