"""Variables that layers read but that are not among their weights."""

import json

import keras
import numpy as np
from keras import ops


class HiddenVariable:
    """Holds a variable that a layer reads, but that is not one of its weights.

    Keras tracks variables that are attributes of a layer, but not those of this object.
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

        By TensorFlow's own `assign`, which takes half as long as Keras's.
        """
        on_tensorflow = keras.backend.backend() == "tensorflow"
        variable = self.variable.value if on_tensorflow else self.variable
        variable.assign(value)


def variables_for_jax(variables) -> list:
    """Returns the variables on JAX, where they would become constants otherwise."""
    if keras.backend.backend() != "jax":
        return []
    return [variable for variable in variables if variable is not None]


class DrawnSeeds(keras.random.SeedGenerator):
    """Generates seeds from one that was drawn before, without a state to write."""

    _initial_seed = 0  # torch's dropout asks whether there is one

    def __init__(self, seed):
        self.seed, self.count = seed, 0

    def next(self, ordered=True):
        steps = np.array([self.count, 0])
        self.count += 1
        return ops.add(self.seed, ops.convert_to_tensor(steps, self.seed.dtype))


def hold_resource(layer, name, variable):
    """Makes TensorFlow track a variable that Keras does not track.

    tf.saved_model.save refuses functions that read an untracked one. The attribute
    holds TensorFlow's variable, because Keras would track its own as a weight.
    """
    if keras.backend.backend() == "tensorflow":
        setattr(layer, f"{name}_resource", variable.value)


def release_resource(layer, name):
    if keras.backend.backend() == "tensorflow":
        delattr(layer, f"{name}_resource")


def hold_state(layer, name, variable, get, put):
    """Makes TensorFlow track a variable that may get its value after a call.

    In TensorFlow's own checkpoints, it is stored as the JSON value that `get` returns,
    which `put` gets when a checkpoint is restored.
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
