"""The trainable half of a LoRA layer: A, B and what scales them."""

import math
import numbers
import random
import types
from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np
from keras import ops


@dataclass(frozen=True)
class LowRankForm:
    """How one layer's kernel is made of A and B: all that differs between kinds.

    Attributes:
        a_shape, b_shape: Shapes of A and B.
        fan_in: How many inputs each entry of A's rank axis sums over.
        compose: (a, b) -> A @ B in the kernel's own shape.
        bypass: (inputs, a, b) -> linear(inputs, compose(a, b)), without forming
            that kernel.
        a_initializer, b_initializer: Starting values. One factor starts as zero,
            so that a fresh adapter changes nothing.
    """

    a_shape: tuple
    b_shape: tuple
    fan_in: int
    compose: Callable
    bypass: Callable
    a_initializer: object = None  # None: U(±1/sqrt(fan_in))
    b_initializer: object = "zeros"


@keras.saving.register_keras_serializable(package="keras_lora")
class LowRankAdapter(keras.layers.Layer):
    """Trainable factors A and B of a low-rank update of a frozen kernel.

        scaling = alpha / rank          (alpha / sqrt(rank) with use_rslora=True)
        delta   = scaling * A @ B       in the kernel's own shape

    It is found as `layer.lora` on every LoRA layer. A and B are float32 under every
    dtype policy but float64, where they are float64.

    Args:
        rank: Whole number > 0, the inner dimension r of the product A @ B.
        alpha: Number > 0. The default is `rank`, which gives a scaling of 1.
        dropout: Number in [0, 1), the share of the adapter's inputs that are
            dropped while training. The frozen path sees no dropout.
        use_rslora: Boolean, divide alpha by sqrt(rank) instead of rank.
        a_initializer: Initializer of A. The default is that of the host layer.
        b_initializer: Initializer of B. The default is that of the host layer.

    Raises:
        ValueError: If an argument is out of its range.

    Reference:
        [Hu et al., 2021](https://arxiv.org/abs/2106.09685);
        use_rslora: [Kalajdzievski, 2023](https://arxiv.org/abs/2312.03732)
    """

    def __init__(
        self,
        rank,
        alpha=None,
        dropout=0.0,
        use_rslora=False,
        a_initializer=None,
        b_initializer=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.rank = checked_rank(rank)
        self.dropout = checked_dropout(dropout)
        self.a_initializer = keras.initializers.get(a_initializer)
        self.b_initializer = keras.initializers.get(b_initializer)
        self.seed_generator = None
        if self.dropout > 0:
            # With a seed of its own: torch ignores the state of one that has none.
            self.seed_generator = keras.random.SeedGenerator(random.randrange(2**31))
        # Compiled functions read the scaling from a variable, so that an adapter
        # with another alpha can be loaded without tracing anew. It is no weight:
        # the namespace keeps it out of Keras's tracking and parameter counts.
        self._scaling = types.SimpleNamespace(variable=None)
        self.set_alpha(self.rank if alpha is None else alpha, use_rslora)

    @property
    def scaling(self) -> float:
        """The factor in front of A @ B."""
        return self.alpha / divisor(self.rank, self.use_rslora)

    def set_alpha(self, alpha, use_rslora=False):
        self.alpha = checked_alpha(alpha)
        self.use_rslora = bool(use_rslora)
        if self._scaling.variable is not None:
            self._scaling.variable.assign(self._scaling_value())

    def _scaling_value(self, shape=(), dtype=None):
        # By way of NumPy: TensorFlow takes a Python number for a float32.
        value = np.full(shape, self.scaling, self.variable_dtype)
        return ops.convert_to_tensor(value)

    def build(self, form, regularizer=None):
        self.form = form
        # autocast=False: merging needs the stored float32 values, also inside a
        # mixed-precision call; the training path casts where it means to.
        self.a = self.add_weight(
            name="a",
            shape=form.a_shape,
            initializer=(
                self.a_initializer or form.a_initializer or uniform(form.fan_in)
            ),
            regularizer=regularizer,
            autocast=False,
        )
        self.b = self.add_weight(
            name="b",
            shape=form.b_shape,
            initializer=self.b_initializer or form.b_initializer,
            regularizer=regularizer,
            autocast=False,
        )
        self._scaling.variable = keras.Variable(
            self._scaling_value,
            shape=(),
            dtype=self.variable_dtype,
            trainable=False,
            autocast=False,
            name="scaling",
        )

    @property
    def variables(self):
        # JAX passes state by hand, and what is not passed becomes a constant.
        if self.built and keras.backend.backend() == "jax":
            return [*super().variables, self._scaling.variable]
        return super().variables

    def factors(self, dtype):
        """A and scaling * B, scaled in the adapter's dtype, then cast."""
        scaled_b = ops.multiply(self.b, self._scaling.variable)
        if dtype == self.variable_dtype:
            return self.a, scaled_b  # the variable: rows of it can be looked up
        return ops.cast(self.a, dtype), ops.cast(scaled_b, dtype)

    def delta(self):
        """The update scaling * A @ B, in the kernel's shape and A's dtype."""
        return self.form.compose(*self.factors(self.variable_dtype))

    def bypass(self, inputs, dtype, training):
        """linear(drop(inputs), delta) by way of rank r: delta is never formed."""
        if training and self.seed_generator is not None:
            inputs = ops.convert_to_tensor(inputs, sparse=False)
            inputs = keras.random.dropout(
                inputs, self.dropout, seed=self.seed_generator
            )
        return self.form.bypass(inputs, *self.factors(dtype))

    def save_own_variables(self, store):
        super().save_own_variables(store)
        # Without alpha the tensors mean nothing: the file brings its own. And with
        # the seed's state the next dropout masks are those of a run never stopped.
        store["alpha"] = self.alpha
        store["use_rslora"] = self.use_rslora
        if self.seed_generator is not None:
            store["seed"] = self.seed_generator.state

    def load_own_variables(self, store):
        values = {key: store[key] for key in store.keys()}  # noqa: SIM118
        if "alpha" in values:
            alpha = values.pop("alpha")[()]
            self.set_alpha(alpha, values.pop("use_rslora")[()])
        seed = values.pop("seed", None)
        if seed is not None and self.seed_generator is not None:
            self.seed_generator.state.assign(seed)
        super().load_own_variables(values)

    def options(self):
        """The constructor's arguments, as they go into the host's config."""
        return {
            "rank": self.rank,
            "alpha": self.alpha,
            "dropout": self.dropout,
            "use_rslora": self.use_rslora,
            "a_initializer": keras.initializers.serialize(self.a_initializer),
            "b_initializer": keras.initializers.serialize(self.b_initializer),
        }

    def get_config(self):
        return {**super().get_config(), **self.options()}


def uniform(fan_in):
    """U(±1/sqrt(fan_in)), the starting values of A in LoRA's own code."""
    limit = 1 / math.sqrt(fan_in)
    return keras.initializers.RandomUniform(-limit, limit)


def divisor(rank, use_rslora):
    """What alpha is divided by."""
    return math.sqrt(rank) if use_rslora else rank


def alpha_at(new_rank, alpha, rank, use_rslora):
    """The alpha that scales at another rank as this one does at its own."""
    return alpha * (new_rank / rank) ** (0.5 if use_rslora else 1)


def checked_rank(rank, lowest=1):
    if (
        isinstance(rank, bool)
        or not isinstance(rank, numbers.Integral)
        or rank < lowest
    ):
        raise ValueError(
            f"`rank` must be a whole number >= {lowest}. Received: rank={rank!r}. "
            "Common ranks are 4 to 64; a LoRA layer with rank=0 has no adapter."
        )
    return int(rank)


def checked_alpha(alpha):
    if not is_number(alpha) or not math.isfinite(alpha) or alpha <= 0:
        raise ValueError(
            "`alpha` must be a finite number > 0, or None for alpha=rank. "
            f"Received: alpha={alpha!r}. The update is scaled by alpha / rank."
        )
    return int(alpha) if alpha == int(alpha) else float(alpha)


def checked_dropout(dropout):
    if not is_number(dropout) or not 0 <= dropout < 1:
        raise ValueError(
            "`dropout` must be a number in [0, 1), the share of the adapter's "
            f"inputs to drop. Received: dropout={dropout!r}."
        )
    return float(dropout)


def is_number(value):
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
