"""Frozen kernels, and variables that layers read but do not list as weights."""

import contextlib
import functools
import json
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_lora.keras_internals import calls, warn_caller


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


def track_resource(layer, name, variable):
    """Makes TensorFlow track a variable that Keras does not track.

    tf.saved_model.save refuses functions that read an untracked one. The attribute
    holds TensorFlow's variable, because Keras would track its own as a weight.
    """
    if keras.backend.backend() == "tensorflow":
        setattr(layer, f"{name}_resource", variable.value)


def untrack_resource(layer, name):
    if keras.backend.backend() == "tensorflow":
        delattr(layer, f"{name}_resource")


def track_state(layer, name, variable, get, put):
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


class PositionBefore(NamedTuple):
    """Position and dtype rule of a variable before it was frozen."""

    position: int
    autocast: bool


@contextlib.contextmanager
def unlocked(layer):
    """Context in which a built layer accepts new state."""
    locked = layer._tracker.locked
    layer._tracker.unlock()
    try:
        yield
    finally:
        if locked:
            layer._tracker.lock()


def freeze(layer, variable):
    """Moves a variable to the layer's non-trainable ones; returns its old place.

    There `layer.trainable = True` does not reach it. It is not created with
    trainable=False, because such a TensorFlow variable could never train later.
    Autocast is turned off: merging adds to the stored value, not to a rounded copy.
    """
    position = [id(v) for v in layer._trainable_variables].index(id(variable))
    place = PositionBefore(position, variable._autocast)
    layer._untrack_variable(variable)
    variable.trainable = False
    variable._autocast = False
    variable.assign = functools.partial(assign_outside_calls, variable)
    mark_frozen(variable)
    with unlocked(layer):
        layer._track_variable(variable)
    return place


def mark_frozen(variable, frozen=True):
    """Marks a variable as the frozen kernel of an adapter."""
    variable.lora_frozen = frozen


def is_frozen_kernel(variable) -> bool:
    return getattr(variable, "lora_frozen", False)


def assign_outside_calls(variable, value):
    """Replaces a frozen kernel's `assign`, so that no wrapper changes W in a call."""
    if calls.in_a_call():
        raise ValueError(
            f"A layer assigns in its call to {variable.path!r}, the frozen kernel of a "
            "LoRA layer. Leave that layer out with exclude=."
        )
    return type(variable).assign(variable, value)


def freeze_spectral_norm(layer):
    """Makes a frozen SpectralNormalization leave its kernel unchanged in training.

    Keras's own assigns to it in every training call, even if it is frozen.
    """
    if isinstance(layer, keras.layers.SpectralNormalization) and layer.built:
        for variable in (layer.kernel, layer.vector_u):
            variable.assign = functools.partial(
                assign_if_trainable, layer.kernel, variable
            )


def assign_if_trainable(kernel, variable, value):
    if kernel.trainable or not calls.in_a_call():
        return type(variable).assign(variable, value)
    return variable


def guard_assign(variable, refuse):
    """Makes a variable's `assign` call refuse(path) first, outside of calls."""
    assign = vars(variable).get("assign")
    guarded = functools.partial(assign_guarded, variable, assign, refuse)
    variable.assign = guarded


def assign_guarded(variable, assign, refuse, value):
    if not (calls.in_a_call() or calls.is_emptied(variable) or value is variable.value):
        refuse(variable.path)
    return type(variable).assign(variable, value) if assign is None else assign(value)


def release_assign(variable):
    """Gives a variable the `assign` back that it had before `guard_assign`."""
    guarded = vars(variable).pop("assign")
    if guarded.args[1] is not None:
        variable.assign = guarded.args[1]


def watch_reads(variable, what):
    """Makes a variable warn if a call reads it, except by `without_watch`."""
    variable.lora_watched = what
    variable.__class__ = watched_class(type(variable))


@functools.cache
def watched_class(cls):
    def read(variable):
        warn_of_read(variable.lora_watched)
        return cls.value.fget(variable)

    value = property(read, cls.value.fset, doc=cls.value.__doc__)
    return type(cls.__name__, (cls,), {"value": value, "unwatched_class": cls})


def without_watch(variable):
    """Returns the variable, or its value if reading it would warn."""
    cls = getattr(variable, "unwatched_class", None)
    return variable if cls is None else cls.value.fget(variable)


def warn_of_read(what):
    """Warns if a call reads W, past the adapter."""
    if calls.in_a_call():
        warn_caller(
            f"A layer reads the {what}, which has an adapter, in "
            "its own call: there the adapter has no effect until it is merged. "
            "Leave that layer out with exclude=, or merge first."
        )


def unfreeze(layer, variable, place):
    """Undoes `freeze`: the weights have their old order, and their old flags."""
    layer._untrack_variable(variable)
    vars(variable).pop("assign", None)
    variable.__class__ = getattr(variable, "unwatched_class", type(variable))
    mark_frozen(variable, False)
    variable.trainable = True
    if getattr(variable.value, "_trainable", None) is False:
        # The TensorFlow variable was created after Keras's was frozen, as in the first
        # call of a subclassed model.
        variable.value._trainable = True
    variable._autocast = place.autocast
    with unlocked(layer):
        layer._track_variable(variable)  # not trainable in a frozen layer
    tracked = layer._trainable_variables
    tracked.insert(place.position, tracked.pop())
