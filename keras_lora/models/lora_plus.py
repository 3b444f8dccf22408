"""LoRA+: an optimizer with a higher learning rate for every B."""

import functools
import math

import keras

from keras_lora.keras_internals import optimizers, private_names, probes
from keras_lora.layers import settings

register = keras.saving.register_keras_serializable(package="keras_lora")


@register
class LoRAPlus(optimizers.TwoRates):
    """Gives every B a learning rate that is `ratio` times as high.

        A <- update(A, learning_rate)            also biases, DoRA's magnitude, heads
        B <- update(B, learning_rate * ratio)

    Weight decay uses the same two rates, if the optimizer has it. Everything else,
    such as schedules and gradient clipping, is that of the optimizer: it becomes a
    LoRAPlus in place, and `LoRAPlus(optimizer) is optimizer`. Its `learning_rate` is
    the rate of A, also for callbacks that read or set it. With ratio=1 it equals the
    plain optimizer.

    When `merge_lora` or `remove_lora` leaves no B in a compiled model, its optimizer
    becomes the plain one again.

    PEFT's `create_loraplus_optimizer` differs: it applies the ratio to all
    one-dimensional parameters too, and trains the factors of embeddings at 1e-6.

    Args:
        optimizer: A Keras optimizer, or its name, that has not been built. To scale
            the loss, wrap the result: LossScaleOptimizer(LoRAPlus(optimizer)).
            `compile` does so by itself under the policy "mixed_float16".
        ratio: Number > 0, the learning rate of B over that of A. Use it with a lower
            learning rate.

    Raises:
        ValueError: If the optimizer is built or cannot be wrapped, or the ratio is out
            of range. When it is built later: if no B is among the variables.

    Examples:
        >>> report = keras_lora.apply_lora(base, rank=4)
        >>> optimizer = keras_lora.LoRAPlus(keras.optimizers.AdamW(2e-5), ratio=16.0)
        >>> base.compile(optimizer, loss="mse")

    Reference:
        [Hayou et al., 2024](https://arxiv.org/abs/2402.12354)
    """

    def __new__(cls, optimizer, ratio=16.0):
        probes.require(private_names.LORA_PLUS)
        optimizer = keras.optimizers.get(optimizer)
        validate_ratio(ratio)
        validate_optimizer(optimizer)
        optimizer.__class__ = lora_plus_class(type(optimizer))
        return optimizer  # Python calls __init__ on it

    def __init__(
        self, optimizer: keras.optimizers.Optimizer | str, ratio: float = 16.0
    ):
        # The optimizer's own __init__ has run already. The long name avoids clashes.
        self.lora_plus_ratio = float(ratio)

    def build(self, variables):
        if not any(map(self.is_faster, variables)):
            raise ValueError(
                f"LoRAPlus found no B of an adapter among {len(variables)} trainable "
                "variables. Call apply_lora(model) before the model trains, or "
                "compile it with the optimizer alone."
            )
        super().build(variables)

    def is_faster(self, variable):
        return getattr(variable, "lora_factor", None) == "B"

    def faster(self, learning_rate):
        return learning_rate * self.lora_plus_ratio

    def get_config(self):
        optimizer = keras.saving.serialize_keras_object(optimizers.plain_view(self))
        return {"optimizer": optimizer, "ratio": self.lora_plus_ratio}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        optimizer = keras.saving.deserialize_keras_object(
            config["optimizer"], custom_objects=custom_objects
        )
        return LoRAPlus(optimizer, config["ratio"])


@functools.cache
def lora_plus_class(plain_class):
    """Returns LoRAPlus over an optimizer's class; all have one name in files."""
    bases = (LoRAPlus, optimizers.optimizer_class(plain_class))
    members = {"plain_class": plain_class, "__module__": __name__}
    new_class = type("LoRAPlus", bases, members)
    register(new_class)
    register(LoRAPlus)  # keep the name for LoRAPlus itself
    return new_class


def validate_ratio(ratio):
    if not settings.is_number(ratio) or not math.isfinite(ratio) or ratio <= 0:
        raise ValueError(
            "`ratio` must be a finite number > 0, B's learning rate over A's. "
            f"Received: ratio={ratio!r}. The paper's is 16."
        )


def validate_optimizer(optimizer):
    name = type(optimizer).__name__
    if optimizer is None:
        raise ValueError("`optimizer` must be a Keras optimizer. Received: None.")
    if isinstance(optimizer, LoRAPlus):
        raise ValueError(
            "`optimizer` is a LoRAPlus already. Give the optimizer inside it."
        )
    if optimizers.optimizer_class(type(optimizer)).update_step is UPDATE_STEP:
        raise ValueError(
            f"`optimizer` is a {name}, which has no update of its own but wraps "
            "optimizers that do. Wrap the other way round, as in "
            f"{name}(LoRAPlus(optimizer))."
        )
    if optimizer.built:
        raise ValueError(
            f"`optimizer`, a {name}, is already built: traced functions would keep its "
            "single learning rate. Wrap a new optimizer, and compile with that."
        )


UPDATE_STEP = keras.optimizers.Optimizer.update_step
