"""Trainable rows of a frozen table: trainable_token_indices."""

import keras
import numpy as np
from keras import ops

from keras_lora.keras_internals import calls
from keras_lora.layers import settings
from keras_lora.layers.adapter import LowRankAdapter
from keras_lora.layers.torch_layout import TokenRowsFiles

KEYWORD = TokenRowsFiles.keyword


@keras.saving.register_keras_serializable(package="keras_lora")
class TokenRows(TokenRowsFiles, LowRankAdapter):
    """Trainable rows that replace some rows of a frozen table.

        y = rows[i] where inputs[..] = indices[i], else W[inputs]

        W     (vocabulary, dim)   frozen
        rows  (n, dim)            start as W[indices]

    A head that is tied to the table uses the rows too. For a Dense head they are
    columns of its kernel, one for each token. Rows are float32 over every table, also
    over a quantized one. There is no rank. Merging writes the rows into W.

    Args:
        trainable_token_indices: Whole numbers >= 0, each once: the rows that train.

    Raises:
        ValueError: If an index is not a whole number >= 0, or is given twice.

    Reference:
        PEFT's `trainable_token_indices`.
    """

    factor_names = ("rows",)
    takes_start = False
    rank = alpha = None  # type: ignore[assignment]

    def __init__(self, trainable_token_indices, dtype=None, name=None, **others):
        super().__init__(1, dtype=dtype, name=name)
        self.indices = settings.validate_indices(trainable_token_indices)

    def build_factors(self, form, regularizer):
        self.axis = 0 if form.looks_up else 1
        kernel = self.read_kernel()
        refuse_outside(self.indices, kernel.shape[self.axis])
        self.rows = self.add_factor(
            "rows",
            (len(self.indices), kernel.shape[1 - self.axis]),
            lambda shape, dtype: self.own_rows(self.read_kernel()),
        )

    def factor_axes(self, form, axes) -> dict:
        """Rows have the layout of the table's rows."""
        return {"rows": [None, axes[1 if form.looks_up else 0]]}

    def own_rows(self, kernel):
        """Returns the rows of the frozen table."""
        kernel = ops.transpose(kernel) if self.axis else kernel
        return ops.take(kernel, np.array(self.indices), axis=0)

    def effective_kernel(self, kernel):
        """Returns W with the trained rows in it."""
        kernel = ops.cast(kernel, self.variable_dtype)
        kernel = ops.transpose(kernel) if self.axis else kernel
        places = np.array(self.indices)[:, None]
        own = ops.take(kernel, places[:, 0], axis=0)
        rows = ops.where(self.switched > 0, ops.convert_to_tensor(self.rows), own)
        kernel = ops.scatter_update(kernel, places, rows)
        return ops.transpose(kernel) if self.axis else kernel

    def set_alpha(self, alpha, use_rslora=False):
        """Does nothing: rows are not scaled."""

    def delta(self):
        kernel = self.read_kernel()
        return ops.subtract(self.effective_kernel(kernel), kernel)

    def outputs(self, host, inputs, training):
        if host.form.looks_up:
            return self.looked_up(host, inputs, training)
        if host.merges_in_call:
            kernel = ops.stop_gradient(host.base_kernel(self.variable_dtype))
            return host.apply_kernel(inputs, self.effective_kernel(kernel))
        return self.with_columns(host, inputs)

    def looked_up(self, host, inputs, training):
        outputs = ops.cast(host.frozen_linear(inputs), self.variable_dtype)
        ids = ops.expand_dims(ops.cast(inputs, "int32"), -1)
        chosen = ops.equal(ids, np.array(self.indices, "int32"))
        chosen = ops.logical_and(chosen, self.switched > 0)
        if training is True and compiled_without_xla():
            return with_rows(outputs, chosen, self.rows)
        chosen = ops.cast(chosen, self.variable_dtype)  # one-hot
        others = 1 - ops.sum(chosen, axis=-1, keepdims=True)
        return outputs * others + ops.matmul(chosen, self.rows)

    def with_columns(self, host, inputs):
        """Returns a quantized head's outputs, with some columns from the rows."""
        outputs = host.frozen_linear(inputs)
        own = host.apply_kernel(
            inputs,
            self.rows if host.form.input_axes == (1,) else ops.transpose(self.rows),
        )
        size = outputs.shape[-1]
        source = np.arange(size)
        source[list(self.indices)] = size + np.arange(len(self.indices))
        both = ops.concatenate([outputs, ops.cast(own, outputs.dtype)], axis=-1)
        return ops.where(self.switched > 0, ops.take(both, source, axis=-1), outputs)

    def options(self):
        return {KEYWORD: list(self.indices)}

    def save_own_variables(self, store):
        keras.layers.Layer.save_own_variables(self, store)

    def load_own_variables(self, store):
        keras.layers.Layer.load_own_variables(self, store)

    def for_bank(self):
        raise ValueError("A bank cannot hold rows of a table for each adapter.")


def compiled_without_xla():
    """Whether TensorFlow compiles a step in which sizes may depend on values."""
    return calls.in_tensorflow_graph() and not calls.traced_for_xla()


def with_rows(outputs, chosen, rows):
    """Replaces the chosen outputs of a lookup by rows, in place.

    An update by `tensor_scatter_nd_update` would copy all outputs first.

    Args:
        outputs: Of shape (..., dim).
        chosen: Booleans of shape (..., n), at most one of them true.
        rows: Of shape (n, dim).
    """
    import tensorflow as tf

    flat = tf.reshape(outputs, (-1, outputs.shape[-1]))
    chosen = tf.reshape(chosen, (-1, chosen.shape[-1]))
    places = tf.where(chosen)[:, 0]
    # A product, because the gradient of a lookup would be sparse.
    own = tf.matmul(tf.cast(tf.gather(chosen, places), rows.dtype), rows)
    for more in (-tf.gather(flat, places), own):  # W's row becomes exactly 0 first
        flat = tf.raw_ops.ScatterNdNonAliasingAdd(
            input=flat, indices=places[:, None], updates=more
        )
    return tf.reshape(flat, tf.shape(outputs))


def refuse_outside(indices, size):
    """Raises if a table of a size has no row for an id."""
    outside = [i for i in indices if i >= size]
    if outside:
        raise ValueError(
            f"`{KEYWORD}` has {outside[:5]}, but the table has {size} rows, with ids "
            f"from 0 to {size - 1}. Make the table larger first."
        )
