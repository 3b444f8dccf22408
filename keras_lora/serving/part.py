"""What an adapter makes of one layer, as a bank keeps it."""

import math

import numpy as np
from keras import ops

from keras_lora.layers.methods import wide_dtype
from keras_lora.layers.torch_layout import to_numpy

UNREAD = object()  # in the place of the adapter that a host may get


class Part:
    """What an adapter makes of one layer.

    Attributes:
        layer: The model's own.
        view: It as a LoRA layer, with an adapter in `lora`, or none.
        bias, kernel: What the adapter has in their place, variables of its own; None:
            nothing.
    """

    bias = kernel = None

    def __init__(self, layer, view):
        self.layer, self.view = layer, view

    @property
    def lora(self):
        return None if self.view.lora is UNREAD else self.view.lora

    @property
    def rank(self) -> int:
        """Of what `factors` gives, the layer's for these shapes."""
        if self.lora is not None:
            return self.lora.product_rank
        return 0 if self.kernel is None else full_rank(self.view)

    @property
    def has_gain(self) -> bool:
        return self.lora is not None and self.lora.has_gain

    @property
    def dropout(self) -> float:
        return 0.0 if self.lora is None else self.lora.dropout

    @property
    def in_full(self) -> bool:
        """Whether A and B are a kernel that trained in full."""
        return self.lora is None and self.kernel is not None

    @property
    def depends_on_base(self) -> bool:
        """Whether what a bank keeps of it holds for these weights of the model alone.

        DoRA's gain does, and the difference of a bias or kernel that trained.
        """
        return self.has_gain or self.bias is not None or self.kernel is not None

    def factors(self):
        """A, scaling * B and gain, as in `LowRankAdapter.for_bank`; None: nothing."""
        if self.lora is not None:
            return self.lora.for_bank()
        if self.kernel is None:
            return None, None, None
        return (*full_update(self.view, self.kernel), None)

    def rows(self, form, bias_over) -> dict:
        """Name -> what one slot holds, as tensors through which gradients go.

        Args:
            form: That of the slots, of a rank as high or higher.
            bias_over: A function that lays out a bias over the outputs.
        """
        found, (a, b, gain) = {}, self.factors()
        if a is not None:
            own = self.view.low_rank_form(self.rank)
            found["a"], found["b"] = own.widened(a, b, self.rank, form)
        if gain is not None:
            found["gain"] = form.over_outputs(gain)
        if self.bias is not None:
            found["bias"] = bias_over(ops.subtract(self.bias, self.layer.bias))
        return found


def full_rank(view):
    sizes = view.kernel_shape
    return view.low_rank_form(1).highest_rank(sizes)


def full_update(view, kernel, checked=False):
    """A and B with A @ B = kernel - W, one of them the identity.

    checked: None where the layer's update is another product than that.
    """
    dtype = wide_dtype(view.variable_dtype)
    update = ops.convert_to_tensor(kernel, dtype) - view.base_kernel(dtype)
    rank = full_rank(view)
    form = view.low_rank_form(rank)
    matrix = ops.transpose(update, form.matrix_axes(len(update.shape)))
    lead = [update.shape[axis] for axis in form.batch_axes]
    eye = ops.broadcast_to(ops.eye(rank, dtype=update.dtype), (*lead, rank, rank))
    inputs = math.prod(update.shape[axis] for axis in form.input_axes)
    a, b = (eye, matrix) if rank == inputs else (matrix, eye)
    sizes = [math.prod(factor.shape) for factor in (a, b)]
    if checked and sizes != [math.prod(form.a_shape), math.prod(form.b_shape)]:
        return None
    a, b = ops.reshape(a, form.a_shape), ops.reshape(b, form.b_shape)
    if checked and not np.allclose(to_numpy(form.compose(a, b)), to_numpy(update)):
        return None
    return a, b
