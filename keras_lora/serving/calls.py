"""What a bank is called with: the model's inputs, and an id for each of their rows."""

import contextlib
from collections.abc import Mapping
from collections.abc import Sequence

import keras
import numpy as np
from keras import ops

from keras_lora.keras_internals.calls import in_a_trace
from keras_lora.keras_internals.calls import keeping_weights
from keras_lora.serving.arguments import refuse_names
from keras_lora.serving.directory import Directory
from keras_lora.serving.export import specs_of
from keras_lora.serving.fixed_ids import SLOTS
from keras_lora.serving.fixed_ids import FixedIds
from keras_lora.serving.fixed_ids import checked_ids
from keras_lora.serving.fixed_ids import refuse_other_ids
from keras_lora.serving.hosts import Hosts
from keras_lora.serving.leading_axis import as_rows
from keras_lora.serving.leading_axis import find_leading_axes
from keras_lora.serving.rows import Choice
from keras_lora.serving.running import Running
from keras_lora.serving.running import needs_all

INPUTS = {"inputs", "adapter"}, {"inputs", SLOTS}


class Calls:
    """Mixin of the bank: its calls, and what is checked of their inputs.

    A call, and all batches of a `predict` or `evaluate`, keep the adapters that the
    ids mean when it begins.
    """

    model: keras.Model
    directory: Directory
    choice: Choice
    hosts: Hosts
    running: Running

    def ids(self, names: Sequence) -> np.ndarray:
        """Returns the ids of a batch from a name, or None (base model), per row.

        Raises:
            ValueError: If a name is not known.
        """
        known = self.directory.known(names)
        return np.array([self.directory.id_of[name] for name in known], "int32")

    def __call__(self, inputs, *args, **kwargs):
        refuse_names(inputs)
        self._refuse_released()
        if in_a_trace(inputs):
            return super().__call__(inputs, *args, **kwargs)
        with self._reading(inputs) as inputs:
            return super().__call__(inputs, *args, **kwargs)

    def call(self, inputs, training=False):
        if not isinstance(inputs, Mapping) or set(inputs) not in INPUTS:
            raise ValueError(unlike_inputs(inputs))
        if SLOTS in inputs:
            slots = inputs[SLOTS]
        else:
            ids = ops.convert_to_tensor(inputs["adapter"])
            refuse_other_ids(ids)
            slots = self.directory.slots(ids)
        self._look_at(inputs["inputs"])
        trainees = self.trainees.each if training and self.trainees else None
        with self.choice.using(slots, trainees):
            return self.model(inputs["inputs"], training=training)

    def compute_output_spec(self, inputs, training=False):
        return self.model.compute_output_spec(inputs["inputs"], training=training)

    def _look_at(self, inputs):
        if not self.choice.all_known:
            try:
                inputs = keras.tree.map_structure(as_rows, inputs)
            except Exception:  # a value of a function that is being traced
                return
            find_leading_axes(self, [inputs], raising=True)
            if self.hosts.input_specs is None:
                self.hosts.input_specs = specs_of(inputs)

    def _refuse_released(self):
        if not self.hosts.layers:
            raise ValueError(f"{self.name!r} was released.")

    @contextlib.contextmanager
    def _reading(self, x, method="call"):
        """Yields x with slots in the place of ids: they keep their adapters inside."""
        refuse_names(x)
        self._refuse_released()
        one = isinstance(x, Mapping) or method not in ("predict", "evaluate")
        if one and not (isinstance(x, Mapping) and set(x) in INPUTS):
            raise ValueError(unlike_inputs(x))
        ids = checked_ids(x["adapter"]) if one and "adapter" in x else None
        if ids is not None and method != "call":
            # Before: on JAX the model has no values during Keras's loops.
            self._look_at(x["inputs"])

        def choose():
            fixed = FixedIds(self.directory.values(), self.directory.no_slot)
            if ids is not None:
                return fixed.inputs(x), fixed.slots(ids).tolist()
            return (x if one else fixed.batches(x)), self.directory.slot_of.values()

        alone = needs_all(method)
        keeping = keeping_weights(self) if alone else contextlib.nullcontext()
        with self.running.call(choose, alone=alone) as fixed, keeping:
            yield fixed

    def evaluate(self, x=None, *args, **kwargs):
        """As `keras.Model.evaluate`; x as in `predict`."""
        with self._reading(x, "evaluate") as x:
            return super().evaluate(x, *args, **kwargs)

    def predict(self, x, *args, **kwargs):
        """As `keras.Model.predict`, with an adapter for each row.

        Args:
            x: {"inputs": what the model takes, "adapter": ids}, where `ids` has one
                whole number for each row, as the method `ids` gives them.
            *args: Of `keras.Model.predict`.
            **kwargs: Likewise.

        Returns:
            What the model returns. A row whose id means no adapter is NaN.
        """
        with self._reading(x, "predict") as x:
            return super().predict(x, *args, **kwargs)

    def predict_on_batch(self, x):
        with self._reading(x, "predict_on_batch") as x:
            return super().predict_on_batch(x)

    def test_on_batch(self, x, *args, **kwargs):
        with self._reading(x, "test_on_batch") as x:
            return super().test_on_batch(x, *args, **kwargs)


def unlike_inputs(inputs):
    return (
        'A bank is called with {"inputs": ..., "adapter": ids}. Received: '
        f"{inputs!r}"[:300]
    )
