"""KerasHub's banks of experts: a bypass beside each product with a stack."""

import inspect

import keras
from keras import ops

from keras_lora.keras_internals import calls, classes
from keras_lora.layers import rematerialized
from keras_lora.layers.adapter import LowRankAdapter
from keras_lora.layers.substituted import SeveralWeights

BANKS = (
    "MixtralMoeExperts",
    "QwenMoeExperts",
    "Qwen3MoeExperts",
    "Qwen3_5MoeExperts",
    "GptOssExperts",
    "Gemma4MoEBlock",
)


def is_bank(cls):
    """Whether a layer class is one of KerasHub's banks of experts."""
    return cls.__module__.partition(".")[0] == "keras_hub" and cls.__name__ in BANKS


class Experts(SeveralWeights):
    """Mixin of a bank of experts, whose call multiplies with stacks of matrices.

        training=True    einsum("th,ehm->etm", x, W)
                         + einsum("etr,erm->etm", einsum("th,ehr->etr", x, A), scaling * B)
        training=False   einsum("th,ehm->etm", x, W + scaling * A @ B)

    In training the bank's own call runs on symbolic weights: the operations that it
    asks for are then computed one by one, with the bypass beside each product that
    `low_rank_equations` understands. Whatever else it does with a weight gets
    W + scaling * A @ B, and so does a method other than LoRA.
    """  # noqa: E501

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "plain_class" in cls.__dict__:
            plain = inspect.signature(cls.plain_class.call)
            training = inspect.Parameter(
                "training", inspect.Parameter.KEYWORD_ONLY, default=None
            )
            cls.call = classes.like_method(Experts.call, cls.plain_class.call)
            # Keras then says whether a call is one of training.
            cls.call.__signature__ = plain.replace(
                parameters=[*plain.parameters.values(), training]
            )

    def call(self, *args, training=None, **kwargs):
        if calls.is_traced(training):
            return ops.cond(
                training,
                lambda: self.call(*args, training=True, **kwargs),
                lambda: self.call(*args, training=False, **kwargs),
            )
        sites = list(self.sites().values())
        if not [
            site for site in sites if rematerialized.training_of(site.lora, training)
        ]:
            return SeveralWeights.call(self, *args, **kwargs)
        stacks = [Stack(site, site.dtype_in_call) for site in sites]
        symbols = [keras.KerasTensor(x.site.kernel_shape, x.dtype) for x in stacks]
        places = [site.kernel_keys for site in sites]
        symbolic = dict(zip(places, symbols, strict=True))
        outputs = classes.call_with(self, self.plain_class, symbolic, args, kwargs)
        values = dict(zip(map(id, symbols), stacks, strict=True))
        return calls.computed(outputs, values, run)


class Stack:
    """A stack of matrices W, and its adapter, in the place of W."""

    def __init__(self, site, dtype):
        self.site, self.dtype = site, dtype

    def whole(self):
        """W + delta."""
        return ops.cast(self.site.kernel_in_call(), self.dtype)

    def product(self, operation, inputs):
        """W and the bypass in a product that an operation is; None: it is no such."""
        lora, equation = self.site.lora, getattr(operation, "subscripts", "")
        equations = low_rank_equations(equation)
        adds = type(lora).low_rank_outputs is LowRankAdapter.low_rank_outputs
        if equations is None or not adds or lora.stand_in is not None:
            return None
        down, up = equations
        a, b = lora.factors(self.dtype)
        kernel = ops.stop_gradient(self.site.base_kernel(self.dtype))
        if keras.backend.backend() == "tensorflow" and is_matmul(equation):
            # The same sums, without the copies of W that its einsum writes.
            outputs = ops.matmul(inputs, kernel)
        else:
            outputs = ops.einsum(equation, inputs, kernel)
        more = ops.einsum(up, ops.einsum(down, inputs, a), b)
        return outputs + ops.cast(more, outputs.dtype)


def run(operation, args, kwargs):
    """The outputs of one operation of a bank's call."""
    if not any(isinstance(x, Stack) for x in args):
        return calls.run_operation(operation, args, kwargs)
    if type(operation).__name__ == "Cast":
        return Stack(args[0].site, operation.dtype)
    if len(args) == 2 and isinstance(args[1], Stack):
        outputs = args[1].product(operation, args[0])
        if outputs is not None:
            return outputs
    args = [x.whole() if isinstance(x, Stack) else x for x in args]
    return calls.run_operation(operation, args, kwargs)


def split(equation):
    """The axes of inputs, of a kernel and of outputs."""
    operands, _, outputs = equation.replace(" ", "").partition("->")
    inputs, _, kernel = operands.partition(",")
    return inputs, kernel, outputs


def low_rank_equations(equation):
    """(inputs, A -> hidden) and (hidden, B -> outputs) of a product with a stack.

    None where it does not sum over the second of the kernel's three axes alone.
    """
    inputs, kernel, outputs = split(equation)
    if len(kernel) != 3 or "." in kernel:
        return None
    stack, rows, columns = kernel
    if not (
        rows in inputs
        and columns not in inputs
        and rows not in outputs
        and {stack, columns} <= set(outputs)
    ):
        return None
    rank = next(letter for letter in "rzyx" if letter not in equation)
    hidden = outputs.replace(columns, rank)
    return (
        f"{inputs},{stack}{rows}{rank}->{hidden}",
        f"{hidden},{stack}{rank}{columns}->{outputs}",
    )


def is_matmul(equation):
    """Whether a product with a stack is that of `matmul`."""
    inputs, (stack, rows, columns), outputs = split(equation)
    return len(outputs) == 3 and (
        outputs == f"{stack}{outputs[1]}{columns}"
        and inputs in (f"{outputs[1]}{rows}", f"{stack}{outputs[1]}{rows}")
    )
