"""LowRankForm: how a layer's update is made of A and B, which differs by kind."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_lora.keras_internals import calls


def last_axes(vector):
    """Returns a vector unchanged, for outputs that end with the kernel's own axes."""
    return vector


def matrices_to_file(a, b):
    """Converts (..., r) and (r, ...) to torch's linear layout: (r, in) and (out, r)."""
    return a.reshape(-1, a.shape[-1]).T, b.reshape(b.shape[0], -1).T


def same(value):
    return value


def flat(vector):
    """Flattens a value of the kernel's output axes, as in torch's linear modules."""
    return vector.reshape(-1)


def unchanged(a, b):
    """Returns factors unchanged, for kinds without a module in torch."""
    return a, b


def pad(value, shape):
    """Pads a value with zeros at the ends of its axes."""
    widths = [(0, new - old) for new, old in zip(shape, value.shape, strict=True)]
    return ops.pad(value, widths)


def merging_size(kernel_size, inputs, outputs):
    """Returns the size of inputs from which a step with W + delta is cheaper.

    Measured for products: four fifths of inputs and outputs are as large as the kernel.

    inputs, outputs: The sizes of a row.
    """
    return -(-5 * kernel_size * inputs // (4 * (inputs + outputs)))


def gradient_of_matrix(rows, of_hidden):
    """Returns the gradient of A in hidden = rows @ A, in the faster order."""
    of_hidden = ops.reshape(of_hidden, (-1, of_hidden.shape[-1]))
    product = ops.matmul(ops.transpose(of_hidden), rows)
    # An einsum, because TensorFlow transposes small arrays slowly for oneDNN.
    return ops.einsum("ri->ir", product)


@dataclass(frozen=True)
class LowRankForm:
    """How A and B of one layer make its update, and how they act on inputs.

    A kind returns it from `low_rank_form(rank)`. Its functions satisfy

        up(down(inputs, A), B) = linear(inputs, compose(A, B))

    Attributes:
        a_shape, b_shape: Shapes of A and B.
        fan_in: How many inputs each component of the rank sums over.
        compose: (A, B) -> A @ B in the kernel's own shape.
        down: (inputs, A) -> hidden, which has r channels instead of the outputs of
            `linear`. None if the layer's call computes with W + delta.
        up: (hidden, B) -> outputs.
        a_initializer, b_initializer: Initializers. One factor starts as zero, so that a
            new adapter changes nothing. None for A means U(±1/sqrt(fan_in)).
        input_axes: The kernel's axes that `linear` sums over.
        batch_axes: The kernel's axes that inputs and outputs share.
        over_outputs: Reshapes a value that has the kernel's other axes, in their order,
            so that it can be multiplied with outputs.
        adapted_outputs: Booleans, which outputs the update reaches, for a kernel with
            one output axis. None means all.
        spread: B -> the factor (batch..., r, new axes...) by which `compose` multiplies
            A, if it is not B itself.
        to_file: (A, B) as NumPy arrays -> the arrays in PEFT's file.
        from_file: The inverse; None if `to_file` only reshapes and transposes.
        vector_to_file: A value as for `over_outputs` -> the array in PEFT's file.
        file_rank: The rank of the file's arrays, if it differs from the layer's.
        one_rank: Boolean, whether A's last axis, and B's first after the batch axes,
            are the rank, so that two pairs of factors can be joined to one.
        file_note: What to add to the error if a file's arrays have other shapes.
        down_by_row, up_by_row: `down` and `up` for an adapter per row:
            (inputs, stack of A, slots) -> hidden, where row i uses stack[slots[i]].
            Without them, `down` and `up` are mapped over the rows.
        looks_up: Boolean, whether `linear` picks rows of the kernel. Adding to its
            outputs then equals adding to the kernel, also at inference.
        acts_on_rows: Boolean, whether the operation acts on the last axis alone.
        merges_from: The size of inputs from which a training step may use W + delta.
            None means never.
        forms_gradient: Boolean, whether such a step takes the gradients of A and B from
            that of W + delta, because there are too few outputs for the rank.
        gradient_of_a: (inputs, gradient of hidden) -> gradient of A, in an order that
            is faster than the backend's own.

    Examples:
        >>> form = LowRankForm(  # of a Dense layer of 6 inputs and 2 units, rank 4
        ...     a_shape=(6, 4),
        ...     b_shape=(4, 2),
        ...     fan_in=6,
        ...     compose=keras.ops.matmul,
        ...     down=keras.ops.matmul,
        ...     up=keras.ops.matmul,
        ... )
    """

    a_shape: tuple
    b_shape: tuple
    fan_in: int
    compose: Callable
    down: Callable | None = None
    up: Callable | None = None
    a_initializer: object = None
    b_initializer: object = "zeros"
    input_axes: tuple = (0,)
    batch_axes: tuple = ()
    over_outputs: Callable = last_axes
    adapted_outputs: np.ndarray | None = None
    spread: Callable = same
    to_file: Callable = matrices_to_file
    from_file: Callable | None = None
    vector_to_file: Callable = flat
    file_rank: int | None = None
    one_rank: bool = True
    file_note: str = ""
    down_by_row: Callable | None = None
    up_by_row: Callable | None = None
    looks_up: bool = False
    acts_on_rows: bool = False
    merges_from: int | None = None
    forms_gradient: bool = False
    gradient_of_a: Callable | None = None

    def merges_at_inference(self, inputs):
        """Whether forming W + delta costs no more than the low-rank path.

        For a table: if at least as many rows are looked up as it has.
        """
        sizes = inputs.shape or (0,)  # TensorFlow's shape of unknown rank is falsy
        rows = math.prod(size or 0 for size in sizes)
        return not self.looks_up or rows >= self.a_shape[0]

    def over_rows(self, function, inputs):
        """Returns function(inputs), the outputs of the layer's operation.

        TensorFlow computes shapes around each product of inputs of an unknown size, as
        in `fit`. So such inputs become rows once, before all products.
        """
        if not self.acts_on_rows or not calls.is_dense_in_graph(inputs):
            return function(inputs)
        shape = inputs.shape
        if shape.is_fully_defined() or shape.rank is None or shape.rank < 3:
            return function(inputs)
        *others, size = [-1 if size is None else size for size in shape]
        if others.count(-1) > 1 or 0 in others:
            others = ops.shape(inputs)[:-1]
        outputs = function(ops.reshape(inputs, (-1, size)))
        return ops.reshape(outputs, (*others, outputs.shape[-1]))

    def bypass(self, inputs, a, b):
        """linear(inputs, compose(A, B)), without forming that kernel."""
        return self.up(self.down(inputs, a), b)

    def bypass_by_row(self, inputs, a, b, slots, training=False):
        """`bypass` in which row i uses a[slots[i]] and b[slots[i]]."""
        if self.down_by_row is None:
            return map_by_row(self.bypass, inputs, a, b, slots, training)
        return self.up_by_row(self.down_by_row(inputs, a, slots), b, slots)

    def widen(self, a, b, rank, wider):
        """Pads A and B with zeros to the shapes of a form of a higher rank."""
        parts = (self.file_rank or rank) // rank  # updates side by side in A
        lead, wide = list(a.shape[:-1]), list(wider.a_shape[:-1])
        a = ops.reshape(a, (*lead, parts, a.shape[-1] // parts))
        a = pad(a, (*wide, parts, wider.a_shape[-1] // parts))
        return ops.reshape(a, wider.a_shape), pad(b, wider.b_shape)

    def is_product(self, sizes):
        """Whether the update of a kernel of these sizes is A @ spread(B)."""
        axes = (*self.batch_axes, *self.input_axes)
        return self.a_shape[:-1] == tuple(sizes[axis] for axis in axes)

    def highest_rank(self, sizes):
        """Returns the full rank of a kernel of these sizes, or of each of a stack."""
        inputs = math.prod(sizes[axis] for axis in self.input_axes)
        batch = math.prod(sizes[axis] for axis in self.batch_axes)
        return min(inputs, math.prod(sizes) // (inputs * batch))

    def over_kernel(self, vector):
        """Reshapes a value that has the kernel's other axes, to multiply W."""
        for axis in sorted(self.input_axes):
            vector = ops.expand_dims(vector, axis)
        return vector

    def factor_axes(self, axes) -> dict:
        """Maps the axes of A, B and m to those of the kernel, for layouts.

        Factors whose axes are not those of the kernel are left out.
        """
        if not self.one_rank:
            return {}
        batch = [axes[axis] for axis in self.batch_axes]
        inputs = [axes[axis] for axis in self.input_axes]
        rest = [axis for axis in range(len(axes)) if axis not in self.input_axes]
        new = [axes[axis] for axis in rest if axis not in self.batch_axes]
        return {
            "a": [*batch, *inputs, None],
            "b": [*batch, None, *new],
            "magnitude": [axes[axis] for axis in rest],
        }

    @property
    def rank_axes_in_file(self):
        """The axes of rank in the arrays of A and B, if the factors have one rank."""
        if self.to_file is unchanged:
            return -1, len(self.batch_axes)
        return 0, 1

    def read_file(self, a, b):
        """Returns A and B from the arrays of a file."""
        if self.from_file is not None:
            return self.from_file(a, b)
        return a.T.reshape(self.a_shape), b.T.reshape(self.b_shape)

    def matrix_axes(self, ndim) -> list:
        """Returns a kernel's axes: batch axes, input axes, then the rest."""
        first = [*self.batch_axes, *self.input_axes]
        return first + [axis for axis in range(ndim) if axis not in first]

    def as_matrix(self, kernel):
        """Returns a kernel (NumPy) as (batch..., inputs, outputs)."""
        lead = [kernel.shape[axis] for axis in self.batch_axes]
        rows = math.prod(kernel.shape[axis] for axis in self.input_axes)
        axes = self.matrix_axes(kernel.ndim)
        return kernel.transpose(axes).reshape(*lead, rows, -1)

    def from_matrix(self, matrix, sizes):
        """Returns the kernel of these sizes for a matrix as from `as_matrix`."""
        axes = self.matrix_axes(len(sizes))
        return matrix.reshape([sizes[axis] for axis in axes]).transpose(
            np.argsort(axes)
        )


def matmul_by_row(inputs, stack, slots, transpose=False):
    """inputs[i] @ stack[slots[i]], or times its transpose."""
    factors = ops.cast(ops.take(stack, slots, axis=0), inputs.dtype)
    if transpose:
        factors = ops.transpose(factors, (0, 2, 1))
    if len(inputs.shape) == 3:
        return ops.matmul(inputs, factors)
    rows, *lead, size = ops.shape(inputs)
    outputs = ops.matmul(ops.reshape(inputs, (rows, math.prod(lead), size)), factors)
    return ops.reshape(outputs, (rows, *lead, factors.shape[-1]))


def take_by_row(ids, stack, slots):
    """stack[slots[i]][ids[i]], without gathering whole tables."""
    count, vocabulary, rank = stack.shape
    ids = ops.cast(ids, "int32")
    ids = ops.where(ids < 0, ids + vocabulary, ids)
    # Otherwise an id outside the table would get a row of another adapter.
    ids = ops.clip(ids, 0, vocabulary - 1)
    slots = ops.reshape(slots, (-1, *[1] * (len(ids.shape) - 1)))
    flat = ops.reshape(stack, (count * vocabulary, rank))
    return ops.take(flat, ids + slots * vocabulary, axis=0)


def einsum_by_row(equation, row, inputs, stack, slots):
    """einsum(equation, inputs[i], stack[slots[i]]); row: the letter of axis i."""
    operand, _, remainder = equation.partition(",")
    factors = ops.cast(ops.take(stack, slots, axis=0), inputs.dtype)
    return ops.einsum(f"{operand},{row}{remainder}", inputs, factors)


def map_by_row(bypass, inputs, a, b, slots, training=False):
    """The bypass of any kind, row by row."""
    a, b = (ops.take(stack, slots, axis=0) for stack in (a, b))
    if "int" not in str(inputs.dtype):
        a, b = (ops.cast(factor, inputs.dtype) for factor in (a, b))

    def one(row):
        inputs, a, b = row
        return bypass(ops.expand_dims(inputs, 0), a, b)[0]

    if keras.backend.backend() == "tensorflow" and training:
        # A vectorized grouped convolution has no gradient in TensorFlow, and any other
        # is a loop anyway.
        return ops.map(one, (inputs, a, b))
    if keras.backend.backend() != "torch":
        return ops.vectorized_map(one, (inputs, a, b))
    # torch cannot vectorize Keras's convolution.
    return ops.stack([one((inputs[i], a[i], b[i])) for i in range(len(slots))])


class Axes(NamedTuple):
    """The axes of a weight that are inputs, and those that count its matrices."""

    inputs: tuple
    batch: tuple = ()


def usual_axes(ndim) -> Axes:
    """Returns the default axes of a weight: its last axis holds the outputs.

    Three axes are a stack of matrices, as in PEFT.
    """
    return Axes((1,), (0,)) if ndim == 3 else Axes(tuple(range(ndim - 1)))


def weight_form(sizes, axes, rank) -> LowRankForm:
    """The form of A @ B, a matrix or a stack of them, in the weight's shape.

    Args:
        sizes: The weight's shape.
        axes: An `Axes`.
        rank: The rank of each matrix.
    """
    inputs, batch = axes
    outputs = [axis for axis in range(len(sizes)) if axis not in (*inputs, *batch)]
    order = [*batch, *inputs, *outputs]
    stack, rows, columns = (
        tuple(sizes[axis] for axis in own) for own in (batch, inputs, outputs)
    )

    def compose(a, b):
        if len(rows) != 1:
            a = ops.reshape(a, (*stack, math.prod(rows), a.shape[-1]))
        if len(columns) != 1:
            b = ops.reshape(b, (*stack, b.shape[len(stack)], math.prod(columns)))
        product = ops.matmul(a, b)
        if len(rows) != 1 or len(columns) != 1:
            product = ops.reshape(product, (*stack, *rows, *columns))
        if order == sorted(order):
            return product
        return ops.transpose(product, np.argsort(order).tolist())

    a_shape, b_shape = (*stack, *rows, rank), (*stack, rank, *columns)

    def to_file(a, b):
        a = a.reshape(math.prod(stack), math.prod(rows), -1)
        b = b.reshape(len(a), a.shape[-1], -1)
        return a.transpose(2, 0, 1), b.transpose(2, 1, 0)

    def from_file(a, b):
        a, b = a.transpose(1, 2, 0), b.transpose(2, 1, 0)
        return a.reshape(a_shape), b.reshape(b_shape)

    in_file: dict = {"to_file": to_file, "from_file": from_file} if batch else {}
    return LowRankForm(
        a_shape=a_shape,
        b_shape=b_shape,
        fan_in=math.prod(rows),
        compose=compose,
        input_axes=tuple(inputs),
        batch_axes=tuple(batch),
        over_outputs=same,  # W + delta is formed in every call
        **in_file,
    )
