"""The scaling of an adapter's update, which may change while functions are compiled."""

import numpy as np
from keras import ops

from keras_lora.keras_internals.hidden_state import HiddenVariable
from keras_lora.keras_internals.hidden_state import hold_state
from keras_lora.layers.settings import Settings


class Scaled:
    """Mixin of an adapter: rank and alpha, and the factor that they make.

    Compiled functions read the factor from a variable, so that another alpha and
    `switch` are seen without tracing anew. It is no weight.
    """

    settings: Settings
    variable_dtype: str
    has_start: bool
    _scaling: HiddenVariable
    switched_off = 0  # by so many, each of which switches it on again

    @property
    def rank(self) -> int:
        return self.settings.rank

    @property
    def product_rank(self) -> int:
        """Of the product that the update is: the columns that `factors` gives of A."""
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
        return not self.switched_off

    def switch(self, on):
        """Switches the adapter off or on: when off, the scaling reads as 0."""
        self.switched_off += -1 if on else 1
        self._write_scaling()

    def _write_scaling(self):
        if self._scaling.variable is not None:
            self._scaling.variable.assign(self._scaling_value())

    def _scaling_value(self, shape=(), dtype=None):
        # By way of NumPy: TensorFlow takes a Python number for a float32.
        value = self.scaling if self.is_on else 0.0
        return ops.convert_to_tensor(np.full(shape, value, self.variable_dtype))

    def make_scaling(self):
        """Makes the variable, when the factors are made."""
        self._scaling.make(self._scaling_value, self.variable_dtype, "scaling")
        hold_state(
            self,
            "alpha",
            self._scaling.variable,
            get=lambda: [self.alpha, self.use_rslora],
            put=lambda state: self.set_alpha(*state),
        )

    @property
    def switched(self):
        """1 where the adapter acts, 0 inside `disabled()`; seen by compiled functions.

        For methods whose formula has no `scaling` in front of all they add.
        """
        return ops.cast(ops.not_equal(self._scaling.variable, 0), self.variable_dtype)
