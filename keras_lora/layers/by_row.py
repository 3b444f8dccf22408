"""The low-rank path with a pair of factors for each row of the inputs.

`stack` holds the factors of all adapters, `slots` says for each row which it uses.
"""

import math

import keras
from keras import ops


def matmul_by_row(inputs, stack, slots, transpose=False):
    """inputs[i] @ stack[slots[i]], or times its transpose."""
    factors = ops.cast(ops.take(stack, slots, axis=0), inputs.dtype)
    if transpose:
        factors = ops.transpose(factors, (0, 2, 1))
    if len(inputs.shape) == 3:
        return ops.matmul(inputs, factors)
    rows, *others, size = ops.shape(inputs)
    outputs = ops.matmul(ops.reshape(inputs, (rows, math.prod(others), size)), factors)
    return ops.reshape(outputs, (rows, *others, factors.shape[-1]))


def take_by_row(ids, stack, slots):
    """stack[slots[i]][ids[i]], without gathering whole tables."""
    count, vocabulary, rank = stack.shape
    ids = ops.cast(ids, "int32")
    ids = ops.where(ids < 0, ids + vocabulary, ids)
    # Else an id that the table has not would be a row of another adapter's.
    ids = ops.clip(ids, 0, vocabulary - 1)
    slots = ops.reshape(slots, (-1, *[1] * (len(ids.shape) - 1)))
    flat = ops.reshape(stack, (count * vocabulary, rank))
    return ops.take(flat, ids + slots * vocabulary, axis=0)


def einsum_by_row(equation, row, inputs, stack, slots):
    """einsum(equation, inputs[i], stack[slots[i]]) where `row` is the rows' axis."""
    operand, _, rest = equation.partition(",")
    factors = ops.cast(ops.take(stack, slots, axis=0), inputs.dtype)
    return ops.einsum(f"{operand},{row}{rest}", inputs, factors)


def mapped_by_row(bypass, inputs, a, b, slots, training=False):
    """Any kind's bypass, row by row."""
    a, b = (ops.take(stack, slots, axis=0) for stack in (a, b))
    if "int" not in str(inputs.dtype):
        a, b = (ops.cast(factor, inputs.dtype) for factor in (a, b))

    def one(row):
        inputs, a, b = row
        return bypass(ops.expand_dims(inputs, 0), a, b)[0]

    if keras.backend.backend() == "tensorflow" and training:
        # There a grouped convolution that is mapped at once has no gradient, and
        # any other is a loop as well.
        return ops.map(one, (inputs, a, b))
    if keras.backend.backend() != "torch":
        return ops.vectorized_map(one, (inputs, a, b))
    # There Keras's convolution cannot be mapped.
    return ops.stack([one((inputs[i], a[i], b[i])) for i in range(len(slots))])
