"""What keras_lora needs of Keras that Keras does not make public, in one place.

There is no public way to add state to a built layer (keras issue 18601), to take
it away again, or to freeze one variable of a layer for good.
"""

import contextlib
from typing import NamedTuple


class Place(NamedTuple):
    """Where a variable stood before it was frozen."""

    index: int
    autocast: bool


@contextlib.contextmanager
def unlocked(layer):
    """A built layer refuses new state; inside this context it does not."""
    locked = layer._tracker.locked
    layer._tracker.unlock()
    try:
        yield
    finally:
        if locked:
            layer._tracker.lock()


def freeze(layer, variable):
    """Moves a variable among the layer's non-trainable ones.

    `layer.trainable = True` does not reach it there. It is not created with
    trainable=False, because a TensorFlow variable born so never trains later.
    Autocast ends too: merging adds to the stored value, not to a rounded copy.
    """
    index = [id(v) for v in layer._trainable_variables].index(id(variable))
    place = Place(index, variable._autocast)
    layer._untrack_variable(variable)
    variable.trainable = False
    variable._autocast = False
    with unlocked(layer):
        layer._track_variable(variable)
    return place


def unfreeze(layer, variable, place):
    """The inverse of `freeze`: same order of weights, same flags."""
    layer._untrack_variable(variable)
    variable.trainable = True
    variable._autocast = place.autocast
    with unlocked(layer):
        layer._track_variable(variable)  # not trainable in a frozen layer
    tracked = layer._trainable_variables
    tracked.insert(place.index, tracked.pop())
