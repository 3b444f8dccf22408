"""The live models that hold a layer: it does not know its owners."""

import gc
import types

import keras

from keras_lora.keras_internals.callers import warn_caller
from keras_lora.keras_internals.layers import flatten_layers
from keras_lora.keras_internals.layers import layer_state

WARNED_AT = types.SimpleNamespace(count=0)  # frozen objects, at the last warning


def holders(model) -> list:
    """The layers of a model, and every live model that shares one which has variables.

    A layer does not know its owners, and their traced functions know it as it was. So
    they are looked for among the garbage collector's objects.
    """
    layers = flatten_layers(model)
    own = {id(vars(layer)) for layer in layers}  # a second view has the same
    shared = {id(layer) for layer in layers if any(layer_state(layer))}
    around = [
        found
        for found in live_models()
        if id(vars(found)) not in own
        and "_layers" in vars(found)
        and not shared.isdisjoint(map(id, flatten_layers(found)))
    ]
    return layers + around


def live_models() -> list:
    """All of the process but those that `gc.freeze` has hidden: a warning says so."""
    if gc.get_freeze_count() > WARNED_AT.count:  # what is deleted lowers it
        WARNED_AT.count = gc.get_freeze_count()
        warn_caller(
            "gc.freeze() was called, which hides the models made before it: if they "
            "share layers with this one, they may still use functions that were "
            "traced before this change. Compile them again."
        )
    # By type, as there are millions of objects.
    wanted = subclasses(keras.Model)
    return [found for found in gc.get_objects() if type(found) in wanted]


def subclasses(cls) -> set:
    """A class and all that extend it."""
    found, more = set(), [cls]
    while more:
        own = more.pop()
        if own not in found:
            found.add(own)
            more += type.__subclasses__(own)
    return found
