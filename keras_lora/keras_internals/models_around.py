"""The live models that hold a layer: it does not know its owners."""

import gc
import types
import weakref

import keras

from keras_lora.keras_internals.layers import flatten_layers
from keras_lora.keras_internals.layers import own_variables


class Mark:
    """An object that is not frozen until `gc.freeze` is called."""


# The models among the collector's frozen objects, and what tells that there are more.
FROZEN = types.SimpleNamespace(models=(), mark=Mark())


def holders(model) -> list:
    """The layers of a model, and every live model that shares one which has variables.

    A layer does not know its owners, and their traced functions know it as it was. So
    they are looked for among the garbage collector's objects.
    """
    layers = flatten_layers(model)
    own = {id(vars(layer)) for layer in layers}  # a second view has the same
    shared = {id(x) for x in layers if own_variables(x) or x._non_trainable_variables}
    around = [
        found
        for found in live_models()
        if id(vars(found)) not in own
        and "_layers" in vars(found)
        and not shared.isdisjoint(map(id, flatten_layers(found)))
    ]
    return layers + around


def live_models() -> list:
    """All of the process, those too that were there when `gc.freeze` was called.

    What is frozen is not among the collector's objects. So it is thawed once, looked
    through and frozen again, with what was made since.
    """
    found = models_and_marks()
    if FROZEN.mark not in found:
        gc.unfreeze()
        FROZEN.models = weakref.WeakSet(models_and_marks())
        gc.freeze()
        FROZEN.mark = Mark()
        found = models_and_marks()
    return [x for x in (*FROZEN.models, *found) if not isinstance(x, Mark)]


def models_and_marks() -> list:
    # By type, as there are millions of objects.
    wanted = {Mark, *subclasses(keras.Model)}
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
