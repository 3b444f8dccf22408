"""Variables that layers read but that are not weights; TensorFlow has to find them."""

import json

import keras
import numpy as np
from keras import ops


class HiddenVariable:
    """A variable that a layer reads, but that is not one of its weights.

    Keras tracks what attributes hold; it does not look into this object.
    """

    def __init__(self):
        self.variable = None

    def make(self, initializer, dtype, name):
        self.variable = keras.Variable(
            initializer,
            shape=(),
            dtype=dtype,
            trainable=False,
            autocast=False,
            name=name,
        )

    def assign(self, value):
        """Assigns a NumPy value of the variable's dtype.

        TensorFlow's own `assign` takes half as long, which a thousand layers feel.
        """
        on_tensorflow = keras.backend.backend() == "tensorflow"
        variable = self.variable.value if on_tensorflow else self.variable
        variable.assign(value)


def variables_for_jax(variables) -> list:
    """The variables, if JAX has to pass them; otherwise they would become constants."""
    if keras.backend.backend() != "jax":
        return []
    return [variable for variable in variables if variable is not None]


class DrawnSeeds(keras.random.SeedGenerator):
    """Seeds that follow from one that was drawn before. There is no state to write."""

    _initial_seed = 0  # torch's dropout asks whether there is one

    def __init__(self, seed):
        self.seed, self.count = seed, 0

    def next(self, ordered=True):
        steps = np.array([self.count, 0])
        self.count += 1
        return ops.add(self.seed, ops.convert_to_tensor(steps, self.seed.dtype))


def hold_resource(layer, name, variable):
    """Lets TensorFlow find a variable that Keras does not track.

    tf.saved_model.save refuses functions that read one that no object holds. It is
    TensorFlow's own variable that the layer holds: Keras would take its for a weight.
    """
    if keras.backend.backend() == "tensorflow":
        setattr(layer, f"{name}_resource", variable.value)


def release_resource(layer, name):
    if keras.backend.backend() == "tensorflow":
        delattr(layer, f"{name}_resource")


def hold_state(layer, name, variable, get, put):
    """Lets TensorFlow find a variable that may get its value when a call has ended.

    TensorFlow's own checkpoints take for it what `get` gives, any JSON value, and hand
    it to `put`.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        class State(tf.train.experimental.PythonState):
            def serialize(self):
                return json.dumps(get())

            def deserialize(self, string):
                put(json.loads(string))

            def _trackable_children(self, save_type="checkpoint", **kwargs):
                return {"value": variable.value} if save_type == "savedmodel" else {}

        setattr(layer, f"{name}_state", State())
