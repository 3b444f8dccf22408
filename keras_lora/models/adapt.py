"""A Keras layer becomes a LoRA layer, and back, in place on the same object."""

import contextlib
import dis
import functools
import inspect

from keras_lora.keras_internals import attach
from keras_lora.keras_internals import change_class
from keras_lora.keras_internals import detach
from keras_lora.keras_internals import flatten_layers
from keras_lora.keras_internals import name_scope_of
from keras_lora.keras_internals import refresh_torch_parameters
from keras_lora.keras_internals import unfreeze
from keras_lora.layers.kinds import lora_class_of
from keras_lora.layers.lora_layer import is_adapted
from keras_lora.models.trainable_flags import restore_trainable_state
from keras_lora.models.trainable_flags import trainable_state


def is_read_by(parent, layer):
    """Whether the parent's code takes the layer's kernel, past its adapter.

    Gemma 4's feed-forward blocks multiply with `self.gating_ffw.kernel`, and never
    call that layer.
    """
    name = lora_class_of(type(layer)).kernel_name
    return any(
        attribute == name and getattr(parent, owner, None) is layer
        for owner, attribute in attribute_pairs(type(parent))
    )


@functools.cache
def attribute_pairs(cls):
    """(a, b) for every `.a.b` in the methods of a layer class."""
    pairs = set()
    for base in cls.__mro__:
        if base.__module__.startswith("keras.src."):
            continue
        for name, method in vars(base).items():
            if not inspect.isfunction(method) or name in ("__init__", "build"):
                continue
            previous = None
            for step in dis.get_instructions(method):
                attribute = step.argval if "ATTR" in step.opname else None
                if previous is not None and attribute is not None:
                    pairs.add((previous, attribute))
                previous = attribute
    return pairs


@contextlib.contextmanager
def adopted(model, adapters):
    """Path -> (layer, adapter): they are LoRA layers inside.

    What is yielded can `pop_all()`: then they stay so. If anything fails before,
    all of them are plain layers again.
    """
    with contextlib.ExitStack() as undo:
        undo.callback(refresh_torch_parameters, model)
        undo.callback(restore_trainable_state, model, trainable_state(model))
        for layer, adapter in adapters.values():
            undo.callback(make_plain, layer)
            adopt(layer, adapter)
        refresh_torch_parameters(model)
        yield undo


def adopt(layer, adapter):
    lora_class = lora_class_of(type(layer))
    change_class(layer, lora_class)
    for name, default in layer.own_attributes.items():
        setattr(layer, name, default)
    attach(layer, "lora", adapter)
    with name_scope_of(layer):
        layer.build_adapter()


def make_plain(layer):
    """A LoRA layer becomes the Keras layer that it extends, with W for kernel."""
    if hasattr(layer, "_kernel_place"):
        unfreeze(layer, layer.frozen_kernel, layer._kernel_place)
        del layer._kernel_place
    detach(layer, "lora")
    for name in layer.own_attributes:
        delattr(layer, name)
    change_class(layer, layer.plain_class)


def lora_layers(model) -> list:
    """The LoRA layers of a model that hold an adapter, each once."""
    return [layer for layer in flatten_layers(model) if is_adapted(layer)]


def built_lora_layers(model):
    """The same, of which there must be one, and all built."""
    layers = lora_layers(model)
    if not layers:
        raise ValueError(
            f"{getattr(model, 'name', model)!r} holds no LoRA layer with an adapter "
            "(rank > 0)."
        )
    for layer in layers:
        if not layer.lora.built:
            raise ValueError(
                f"The LoRA layer {layer.name!r} is not built yet. Build the model "
                "first, for example with `model.build(input_shape)`, or call it once."
            )
    return layers


def checked_lora_layers(model):
    """The same, none of them inside `merged()` or `disabled()`."""
    layers = built_lora_layers(model)
    for layer in layers:
        if layer._fixed_kernel is not None:
            raise ValueError(
                f"The adapter of {layer.name!r} is inside `merged()` or `disabled()`. "
                "Leave that context first."
            )
    return layers
