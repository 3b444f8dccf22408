"""The adapter of a LoRA layer: A and B, and how a call uses them."""

import math
import random

import keras
import numpy as np
from keras import ops

from keras_lora.keras_internals import variable_state
from keras_lora.keras_internals.variable_state import HiddenVariable, PositionBefore
from keras_lora.layers import merged_training, rematerialized, settings
from keras_lora.layers.saved_values import AdapterFiles
from keras_lora.layers.settings import Settings


@keras.saving.register_keras_serializable(package="keras_lora")
class LowRankAdapter(AdapterFiles, keras.layers.Layer):
    """Trainable factors A and B of a low-rank update of a frozen kernel.

        scaling = alpha / rank          (alpha / sqrt(rank) with use_rslora=True)
        delta   = scaling * A @ B       in the kernel's own shape

    With frozen initial values A0 and B0, as `initialize_lora` sets them, their product
    is subtracted:

        delta   = scaling * (A @ B - A0 @ B0)
                = scaling * [A - A0, A0] @ [B; B - B0]

    The second line is what is computed: it is exactly zero at the start in every dtype,
    and small steps lose no digits. W does not change. The rank of the update is up to
    2 * rank, and a file holds it as a plain LoRA of that rank.

    A LoRA layer holds it as `layer.lora`. A and B are float32, or float64 under the
    float64 policy.

    Another method is a subclass: it implements `build_factors`, `effective_kernel` and
    `low_rank_outputs`, names its variables in `factor_names`, and has a `keyword`, by
    which it is chosen after `register_method`.

    Args:
        rank: Whole number > 0, the inner dimension r of the product A @ B.
        alpha: Number > 0. The default is `rank`, which gives a scaling of 1.
        dropout: Number in [0, 1), the share of the adapter's inputs that are
            dropped while training. The frozen path sees no dropout.
        use_rslora: Boolean, divide alpha by sqrt(rank) instead of rank.
        a_initializer: Initializer of A. The default is that of the host layer.
        b_initializer: Initializer of B. The default is that of the host layer.
        frozen_start: Boolean, hold A0 and B0 as weights that do not train.

    Raises:
        ValueError: If an argument is out of its range.

    Reference:
        [Hu et al., 2021](https://arxiv.org/abs/2106.09685);
        use_rslora: [Kalajdzievski, 2023](https://arxiv.org/abs/2312.03732)
    """

    factor_names: tuple[str, ...] = ("a", "b")
    magnitude = None  # DoRA's m
    has_gain = False  # whether outputs are multiplied too; see `for_bank`
    # Whether `initialize_lora` may set A0 and B0; not inherited, see `refuse_used`.
    takes_start = True
    removal_hint = "merge_lora(model) or remove_lora(model)"
    is_bank = False  # whether it holds many adapters, which only a bank may change
    # Used instead in calls: `FixedKernel` (`merged`), `Recorder` (`initialize_lora`).
    stand_in = None
    kernel_place: PositionBefore | None = None  # position of W before it was frozen
    off_count = 0  # number of contexts that have switched it off

    def __init__(
        self,
        rank,
        alpha=None,
        dropout=0.0,
        use_rslora=False,
        a_initializer=None,
        b_initializer=None,
        frozen_start=False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.has_start = bool(frozen_start)
        self.settings = Settings(rank, alpha, use_rslora)
        self.dropout = settings.validate_dropout(dropout)
        self.a_initializer = keras.initializers.get(a_initializer)
        self.b_initializer = keras.initializers.get(b_initializer)
        self.seed_generator = None
        if self.dropout > 0:
            # With an explicit seed: otherwise torch ignores the generator's state.
            self.seed_generator = keras.random.SeedGenerator(random.randrange(2**31))
        self._scaling = HiddenVariable()

    # Variables.

    def build(self, form, regularizer=None, read_kernel=None):
        # A function of a dtype that returns W, as a variable among these arguments
        # would become a weight.
        self.form, self.read_kernel_as = form, read_kernel
        self.build_factors(form, regularizer)
        self.make_scaling()

    def read_kernel(self):
        """W in the adapter's dtype, for methods that need it outside of calls."""
        return self.read_kernel_as(self.variable_dtype)

    def build_factors(self, form, regularizer):
        """Creates the variables that are named in `factor_names`."""
        self.a = self.add_factor(
            "a",
            form.a_shape,
            self.a_initializer or form.a_initializer or uniform(form.fan_in),
            regularizer,
        )
        self.b = self.add_factor(
            "b", form.b_shape, self.b_initializer or form.b_initializer, regularizer
        )
        self.b.lora_factor = "B"  # LoRAPlus recognizes it by this
        if self.has_start:
            refuse_start(form)
            for name, factor in (("a_start", self.a), ("b_start", self.b)):
                start = self.add_factor(name, factor.shape, "zeros", trainable=False)
                setattr(self, name, start)

    def factor_axes(self, form, axes) -> dict:
        """Maps the names of factors to their axes in the layout of W."""
        by_name = form.factor_axes(axes)
        return by_name | {f"{name}_start": own for name, own in by_name.items()}

    def start_from_kernel(self):
        """Resets values that start from W, after W was assigned; LoRA has none."""

    def add_factor(self, name, shape, initializer, regularizer=None, trainable=True):
        # autocast=False: merging needs the stored float32 values, also inside a
        # mixed-precision call; the training path casts explicitly.
        return self.add_weight(
            name=name,
            shape=shape,
            initializer=initializer,
            regularizer=regularizer,
            trainable=trainable,
            autocast=False,
        )

    @property
    def variables(self):
        hidden = [self._scaling.variable, getattr(self.stand_in, "kernel", None)]
        return [*super().variables, *variable_state.variables_for_jax(hidden)]

    def named_factors(self) -> dict:
        """Name -> variable, for files, reports and checks."""
        starts = ("a_start", "b_start") if self.has_start else ()
        return {name: getattr(self, name) for name in (*self.factor_names, *starts)}

    def unscaled_factors(self):
        """A and B, or [A - A0, A0] and [B; B - B0] with a start."""
        if not self.has_start:
            return self.a, self.b  # variables, so that rows of A can be looked up
        a, b, a_start, b_start = map(
            ops.convert_to_tensor, (self.a, self.b, self.a_start, self.b_start)
        )
        rank_axis = len(self.form.batch_axes)  # of B; in A it is the last axis
        return (
            ops.concatenate([a - a_start, a_start], axis=-1),
            ops.concatenate([b, b - b_start], axis=rank_axis),
        )

    def factors(self, dtype):
        """A and scaling * B, scaled in the adapter's dtype, then cast."""
        a, b = self.unscaled_factors()
        # By their values: Keras's variables take TensorFlow three times as long.
        value = b.value if isinstance(b, keras.Variable) else b
        scaled_b = ops.multiply(value, self._scaling.variable.value)
        if dtype == self.variable_dtype:
            return a, scaled_b
        return ops.cast(a, dtype), ops.cast(scaled_b, dtype)

    def delta(self):
        """The update scaling * A @ B, in the kernel's shape and A's dtype."""
        return self.form.compose(*self.factors(self.variable_dtype))

    def quantize(self, mode=None, type_check=True, config=None):
        """Does nothing: A and B stay float when their model is quantized."""

    def outputs(self, host, inputs, training):
        """Returns the layer's outputs before bias and activation."""
        merges = host.merges_in_call and host.form.merges_at_inference(inputs)
        if training or not merges:
            return self.low_rank_outputs(host, inputs, training)
        kernel = self.effective_kernel(host.base_kernel(self.variable_dtype))
        return host.apply_kernel(inputs, kernel)

    def effective_kernel(self, kernel):
        """W + delta, in the adapter's dtype."""
        kernel = ops.convert_to_tensor(kernel, self.variable_dtype)
        return ops.add(kernel, self.delta())

    def low_rank_outputs(self, host, inputs, training):
        """linear(x, W) + linear(drop(x), A) @ (scaling * B)."""
        dtype = self.variable_dtype if host.form.looks_up else host.compute_dtype
        a, b = self.factors(dtype)
        merges = training and merged_training.merging_pays(host, self, inputs)

        def outputs(inputs):
            if merges:
                return merged_training.linear_with_update(host, inputs, a, b)
            dropped = self.apply_dropout(inputs) if training else inputs
            frozen = ops.cast(host.frozen_linear(inputs), dtype)
            # Not ops.add, which on TensorFlow mistakes an empty batch for a bias.
            return frozen + ops.cast(host.form.bypass(dropped, a, b), dtype)

        return host.form.over_rows(outputs, inputs)

    def for_bank(self) -> tuple:
        """Returns the arrays that a bank stores: A, scaling * B, and gain or None.

            y = gain * (linear(x, W) + linear(x, A) @ (scaling * B))

        with the gain in the shape of the kernel's other axes.
        """
        if type(self).effective_kernel is not LowRankAdapter.effective_kernel:
            raise ValueError(f"{type(self).__name__} cannot be used in an AdapterBank.")
        return (*self.factors(self.variable_dtype), None)

    def apply_dropout(self, inputs):
        """Dropout on the adapter's inputs."""
        if self.seed_generator is None:
            return inputs
        inputs = ops.convert_to_tensor(inputs, sparse=False)
        return keras.random.dropout(
            inputs, self.dropout, seed=rematerialized.seed_of(self)
        )

    # Rank, alpha and scaling. Compiled functions read the scaling from a variable that
    # is not a weight, so a new alpha and `switch` need no retracing.

    @property
    def rank(self) -> int:
        return self.settings.rank

    @property
    def product_rank(self) -> int:
        """The rank of the update: the number of columns of A in `factors`."""
        return 2 * self.rank if self.has_start else self.rank

    @property
    def use_rslora(self) -> bool:
        return self.settings.use_rslora

    @property
    def scaling(self) -> float:
        """The factor in front of A @ B."""
        return self.settings.scaling

    @property
    def alpha(self) -> float:
        return self.settings.alpha

    @alpha.setter
    def alpha(self, alpha):
        self.set_alpha(alpha, self.use_rslora)

    def set_alpha(self, alpha, use_rslora=False):
        """Sets alpha; compiled functions see the new value too."""
        self.settings = Settings(self.rank, alpha, use_rslora)
        self._write_scaling()

    @property
    def is_on(self) -> bool:
        return not self.off_count

    def switch(self, on):
        """Switches the adapter off or on: when off, the scaling reads as 0."""
        self.off_count += -1 if on else 1
        self._write_scaling()

    def _write_scaling(self):
        if self._scaling.variable is not None:
            self._scaling.assign(self._scaling_value())

    def _scaling_value(self, shape=(), dtype=None):
        # Through NumPy, because TensorFlow converts Python numbers to float32.
        value = self.scaling if self.is_on else 0.0
        return np.full(shape, value, self.variable_dtype)

    def make_scaling(self):
        """Creates the scaling's variable, after the factors."""
        self._scaling.make(self._scaling_value, self.variable_dtype, "scaling")
        variable_state.track_state(
            self,
            "alpha",
            self._scaling.variable,
            get=lambda: [self.alpha, self.use_rslora],
            put=lambda state: self.set_alpha(*state),
        )

    @property
    def switched(self):
        """1, or 0 inside `disabled()`, as a tensor that compiled functions read.

        For methods that do not multiply all that they add by `scaling`.
        """
        return ops.cast(ops.not_equal(self._scaling.variable, 0), self.variable_dtype)


class FixedKernel:
    """Stands in for an adapter: one fixed, merged kernel."""

    def __init__(self, kernel):
        self.kernel = kernel

    def effective_kernel(self, kernel):
        return ops.stop_gradient(self.kernel)

    def outputs(self, host, inputs, training):
        return host.apply_kernel(inputs, ops.stop_gradient(self.kernel))


def refuse_start(form):
    """Raises if initial values cannot be subtracted by factors of twice the rank."""
    if form.looks_up or not form.one_rank:
        what = "an embedding" if form.looks_up else "a layer of several low ranks"
        raise ValueError(
            f"Initial values that are subtracted are not possible for {what}, whose "
            "factors are not one product. Keep LoRA's own initial values there, with "
            "A @ B = 0."
        )


def uniform(fan_in):
    """Returns U(±1/sqrt(fan_in)), the initializer of A in LoRA's own code."""
    limit = 1 / math.sqrt(fan_in)
    return keras.initializers.RandomUniform(-limit, limit)
