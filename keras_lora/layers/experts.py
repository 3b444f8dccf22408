"""KerasHub's layers of experts, with the low-rank path beside each product."""

import inspect

import keras
from keras import ops

from keras_lora.keras_internals import calls
from keras_lora.layers import products, rematerialized
from keras_lora.layers.substituted import SeveralWeights

EXPERT_LAYERS = (
    "MixtralMoeExperts",
    "QwenMoeExperts",
    "Qwen3MoeExperts",
    "Qwen3_5MoeExperts",
    "GptOssExperts",
    "Gemma4MoEBlock",
)


def is_expert_layer(cls):
    """Whether a layer class is one of KerasHub's layers of experts."""
    return (
        cls.__module__.partition(".")[0] == "keras_hub"
        and cls.__name__ in EXPERT_LAYERS
    )


class Experts(SeveralWeights):
    """Mixin of a layer of experts, whose call multiplies with stacks of matrices.

        training=True    einsum("th,ehm->etm", x, W)
                         + einsum("etr,erm->etm", einsum("th,ehr->etr", x, A), scaling * B)
        training=False   einsum("th,ehm->etm", x, W + scaling * A @ B)

    In training, the layer's own call runs on symbolic weights. Its operations are then
    computed one by one, with the low-rank path beside each product that
    `low_rank_equations` understands. Other operations on a weight, and methods other
    than LoRA, get W + scaling * A @ B.
    """  # noqa: E501

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "plain_class" in cls.__dict__:
            plain = inspect.signature(cls.plain_class.call)
            training = inspect.Parameter(
                "training", inspect.Parameter.KEYWORD_ONLY, default=None
            )
            # So that Keras passes `training` to the call.
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
        stacks = {site.kernel_keys: Stack(site, site.dtype_in_call) for site in sites}
        return products.call_with_products(self, self.plain_class, stacks, args, kwargs)


class Stack(products.AdaptedWeight):
    """Stands for a stack of matrices W together with its adapter."""

    def outputs(self, operation, args):
        if type(operation).__name__ == "Cast":
            return Stack(self.site, operation.dtype)
        equation = getattr(operation, "subscripts", "")
        equations = low_rank_equations(equation)
        if equations is None or args[1] is not self or not self.is_low_rank:
            return None
        (inputs, _), (down, up) = args, equations
        a, b = self.site.lora.factors(self.dtype)
        kernel = ops.stop_gradient(self.site.base_kernel(self.dtype))
        if keras.backend.backend() == "tensorflow" and is_matmul(equation):
            # The same sums as its einsum, without copies of W.
            outputs = ops.matmul(inputs, kernel)
        else:
            outputs = ops.einsum(equation, inputs, kernel)
        low_rank = ops.einsum(up, ops.einsum(down, inputs, a), b)
        return outputs + ops.cast(low_rank, outputs.dtype)


def split_equation(equation):
    """Splits an equation into the axes of inputs, kernel and outputs."""
    operands, _, outputs = equation.replace(" ", "").partition("->")
    inputs, _, kernel = operands.partition(",")
    return inputs, kernel, outputs


def low_rank_equations(equation):
    """(inputs, A -> hidden) and (hidden, B -> outputs) of a product with a stack.

    None unless it sums over exactly the second of the kernel's three axes.
    """
    inputs, kernel, outputs = split_equation(equation)
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
    """Whether a product with a stack equals `matmul`."""
    inputs, (stack, rows, columns), outputs = split_equation(equation)
    return len(outputs) == 3 and (
        outputs == f"{stack}{outputs[1]}{columns}"
        and inputs in (f"{outputs[1]}{rows}", f"{stack}{outputs[1]}{rows}")
    )
