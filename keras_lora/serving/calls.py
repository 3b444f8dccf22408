"""What a bank is called with: the model's inputs, and an id for each of their rows."""

from collections.abc import Mapping

import keras
import numpy as np
from keras import ops

from keras_lora.serving.arguments import refuse_names
from keras_lora.serving.directory import Directory
from keras_lora.serving.export import specs_of
from keras_lora.serving.hosts import Hosts
from keras_lora.serving.leading_axis import as_rows
from keras_lora.serving.leading_axis import find_leading_axes
from keras_lora.serving.rows import Choice


class Calls:
    """Mixin of the bank: its calls, and what is checked of their inputs."""

    model: keras.Model
    directory: Directory
    choice: Choice
    hosts: Hosts

    def ids(self, names) -> np.ndarray:
        """The ids of a batch: a name, or None for the base model, for each row.

        Raises:
            ValueError: If a name is not known.
        """
        known = self.directory.known(names)
        return np.array([self.directory.id_of[name] for name in known], "int32")

    def __call__(self, inputs, *args, **kwargs):
        refuse_names(inputs)
        return super().__call__(inputs, *args, **kwargs)

    def call(self, inputs, training=False):
        if not self.hosts.layers:
            raise ValueError(f"{self.name!r} was released.")
        if not isinstance(inputs, Mapping) or set(inputs) != {"inputs", "adapter"}:
            raise ValueError(
                'A bank is called with {"inputs": ..., "adapter": ids}. Received: '
                f"{inputs!r}"[:300]
            )
        inputs, ids = inputs["inputs"], inputs["adapter"]
        ids = ops.convert_to_tensor(ids)
        if "int" not in str(ids.dtype) or len(ids.shape) != 1:
            raise ValueError(
                '"adapter" must be a vector of whole numbers, as `bank.ids(names)` '
                f"gives them. Received: shape {ids.shape}, dtype {ids.dtype}."
            )
        self._look_at(inputs)
        trainees = self.trainees.each if training and self.trainees else None
        with self.choice.using(self.directory.slots(ids), trainees):
            return self.model(inputs, training=training)

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

    def evaluate(self, x=None, *args, **kwargs):
        refuse_names(x)
        return super().evaluate(x, *args, **kwargs)

    def predict_on_batch(self, x):
        refuse_names(x)
        return super().predict_on_batch(x)

    def predict(self, x, *args, **kwargs):
        refuse_names(x)
        if isinstance(x, Mapping) and "inputs" in x:
            # Before: on JAX the model has no values during Keras's predict.
            self._look_at(x["inputs"])
        return super().predict(x, *args, **kwargs)
