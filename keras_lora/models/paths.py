"""Names for layers that are the same in every process and every instance."""

import collections
import functools
import re

import keras

from keras_lora.keras_internals.layers import attributes_of
from keras_lora.keras_internals.layers import checked_model
from keras_lora.keras_internals.layers import refuse_other_copy
from keras_lora.keras_internals.layers import sublayers
from keras_lora.layers.arguments import snake_case
from keras_lora.layers.kinds import lora_class_of
from keras_lora.layers.lora_layer import LoRALayer


def layer_paths(model, alone=True) -> dict:
    """Path -> layer for every layer inside a model, each once, outermost first.

    A part of a path is the name that somebody gave to the layer, else the
    attribute that holds it, else its kind; Keras's automatic names (dense_7) count
    instances in the process and say nothing. Where a model puts its own name before
    those of its layers, as many in KerasHub do once they have one, that is left out.
    Equal parts are numbered in order.

    alone: Whether a layer by itself that can be adapted is among its own paths.
    """
    checked_model(model)
    refuse_other_copy(model)
    paths, seen = {}, {id(model)}

    def walk(parent, prefix, owners):
        if isinstance(parent, keras.Model):
            owners = sorted((f"{parent.name}_", *owners), key=len, reverse=True)
        used = collections.Counter()
        attributes = {id(layer): name for name, layer in attributes_of(parent)}
        for layer in sublayers(parent):
            if id(layer) in seen:
                continue
            seen.add(id(layer))
            refuse_other_copy(layer)
            part = (
                given_name(layer, owners, parent)
                or attributes.get(id(layer))
                or kind_in_words(type(layer))
            )
            used[part] += 1
            if used[part] > 1:
                part = f"{part}_{used[part] - 1}"
            paths[prefix + part] = layer
            walk(layer, f"{prefix}{part}/", owners)

    prefix, kind = "", lora_class_of(type(model))  # type: ignore[arg-type]
    if alone and (kind is not None or isinstance(model, LoRALayer)):
        name = given_name(model, (), None) or kind_in_words(type(model))
        paths[name], prefix = model, f"{name}/"
    walk(model, prefix, ())
    return paths


def with_model(model, paths) -> dict:
    """The paths, and the model itself under "" where they have it not."""
    alone = any(layer is model for layer in paths.values())
    return dict(paths) if alone else {"": model, **paths}


def given_name(layer, owners, parent):
    """The layer's name without those of its owners; None where Keras made it up."""
    name = layer.name
    for owner in owners:
        name = name.removeprefix(owner) or name
    kind = re.sub(r"_\d+$", "", name)
    if isinstance(parent, keras.layers.Bidirectional):
        kind = re.sub("^(forward|backward)_", "", kind)  # made of the name it was given
    return None if kind in automatic_names(type(layer)) else name


@functools.cache
def automatic_names(cls):
    """What Keras calls an instance that got no name, before it adds a number."""
    kinds = {snake_case(base.__name__) for base in cls.__mro__}
    return frozenset(kinds | {f"lora_{kind_in_words(cls)}"})


def kind_in_words(cls):
    """The kind of a layer class as a word, the same with and without an adapter."""
    while issubclass(cls, LoRALayer):
        cls = cls.plain_class
    return snake_case(cls.__name__)
