"""The state of built layers: variables, sublayers, classes."""

import contextlib
import functools
import inspect
from typing import NamedTuple

import keras

from keras_lora.keras_internals.calls import in_a_call


class Place(NamedTuple):
    """Where a variable stood before it was frozen."""

    position: int
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
    position = [id(v) for v in layer._trainable_variables].index(id(variable))
    place = Place(position, variable._autocast)
    layer._untrack_variable(variable)
    variable.trainable = False
    variable._autocast = False
    variable.assign = functools.partial(assign_outside_calls, variable)
    with unlocked(layer):
        layer._track_variable(variable)
    return place


def assign_outside_calls(variable, value):
    """In the place of a frozen kernel's `assign`, for wrappers that would move W."""
    if in_a_call():
        raise ValueError(
            f"A layer assigns to {variable.path!r} in its call, which is the frozen "
            "kernel of a LoRA layer. Leave that layer out with exclude=."
        )
    return type(variable).assign(variable, value)


def keep_frozen(layer):
    """A frozen SpectralNormalization leaves its kernel alone, as one that predicts.

    Keras's assigns to it in every training call, whether it is frozen or not.
    """
    if isinstance(layer, keras.layers.SpectralNormalization) and layer.built:
        for variable in (layer.kernel, layer.vector_u):
            variable.assign = functools.partial(
                assign_if_trainable, layer.kernel, variable
            )


def assign_if_trainable(kernel, variable, value):
    if kernel.trainable or not in_a_call():
        return type(variable).assign(variable, value)
    return variable


def unfreeze(layer, variable, place):
    """The inverse of `freeze`: same order of weights, same flags."""
    layer._untrack_variable(variable)
    vars(variable).pop("assign", None)
    variable.trainable = True
    if getattr(variable._value, "_trainable", None) is False:
        # The TensorFlow variable was made after Keras's was frozen, as happens when
        # a subclassed model is built by its first call.
        variable._value._trainable = True
    variable._autocast = place.autocast
    with unlocked(layer):
        layer._track_variable(variable)  # not trainable in a frozen layer
    tracked = layer._trainable_variables
    tracked.insert(place.position, tracked.pop())


def checked_model(model):
    """An error that says what was given in a model's place."""
    if not isinstance(model, keras.layers.Layer):
        raise ValueError(
            "`model` must be a Keras model or layer. Received: "
            f"{type(model).__name__}, {str(model)[:99]!r}."
        )


def flatten_layers(model):
    """The model itself and every layer inside it, each once.

    Keras's public `layers` is a model's alone, and goes one level deep.
    """
    checked_model(model)
    return model._flatten_layers(include_self=True, recursive=True)


def attach(layer, name, sublayer):
    """Gives a layer that may be built a sublayer."""
    with unlocked(layer):
        setattr(layer, name, sublayer)
        # torch keeps modules where the default of a class hides them.
        vars(layer)[name] = sublayer


def detach(layer, name):
    """Takes a sublayer away again: Keras goes on tracking one that was deleted."""
    with unlocked(layer):
        layer._tracker.untrack(getattr(layer, name))
        delattr(layer, name)
        vars(layer).pop(name, None)


def take_own_policy(layer):
    """Gives a quantized layer its own policy in the place of all its model's.

    So it is in a model that was loaded; Keras then saves it as if it were in float.
    """
    if isinstance(layer.dtype_policy, keras.dtype_policies.DTypePolicyMap):
        layer._dtype_policy = layer.dtype_policy[layer.path]


def seen_as(layer, cls):
    """The same layer under another class: a second object over the same attributes.

    Its methods can be asked, for a configuration say, while other threads use the
    layer itself, of which nothing changes.
    """
    view = object.__new__(cls)
    object.__setattr__(view, "__dict__", vars(layer))
    return view


def twin(layer, cls, changed):
    """A view of a layer under a class, of which some attributes are others."""
    view = object.__new__(cls)
    object.__setattr__(view, "__dict__", {**vars(layer), **changed})
    return view


class QuantizedWhole:
    """A mixin before a layer's class: `Model.quantize` does not pass the layer by.

    It asks every layer for what is inside, and quantizes those with nothing in them;
    `filters` are asked for these alone. An adapter is inside its layer.
    """

    def _flatten_layers(self, include_self=True, recursive=True):
        caller = inspect.currentframe().f_back
        asked_by = caller.f_locals.get("self")
        if caller.f_code.co_name == "quantize" and isinstance(asked_by, keras.Model):
            return [self]
        return super()._flatten_layers(include_self, recursive)


def change_class(layer, new_class):
    """Gives a layer another class, and renews what Keras cached of the old one."""
    for name in ("build", "quantize"):
        # `Layer.__new__` hides the method in a closure of the instance.
        wrapper = vars(layer)[name]
        held = [
            c for c in wrapper.__closure__ if c.cell_contents == wrapper.__wrapped__
        ]
        if len(held) != 1:
            raise RuntimeError(
                f"Keras {keras.__version__} wraps `{name}` of a layer in another way "
                "than keras_lora knows. Please report it, and use an earlier Keras."
            )
        method = getattr(new_class, name).__get__(layer)
        held[0].cell_contents = wrapper.__wrapped__ = method
    # Keras leaves here what it replaces while it calibrates.
    if getattr(vars(layer).get("call"), "__func__", None) is type(layer).call:
        del layer.call
    layer.__class__ = new_class
    layer._call_signature = inspect.signature(layer.call)
    parameters = list(layer._call_signature.parameters)
    layer.call_signature_parameters = parameters
    layer._call_has_training_arg = "training" in parameters
    layer._call_has_mask_arg = "mask" in parameters
    if hasattr(layer, "_call_has_context_arg"):
        layer._call_has_context_arg = {
            name: name in parameters for name in layer._call_has_context_arg
        }


def refresh_torch_parameters(layers):
    """The torch backend keeps a second register of parameters in every layer."""
    for layer in layers:
        if hasattr(layer, "_torch_params"):
            layer._track_variables()


def sublayers(layer):
    """The layers that a layer holds itself, in the order in which it got them.

    A layer that is no model has no public list of them.
    """
    wrapped = getattr(layer, "_functional", None)  # a Sequential's second view
    return [sublayer for sublayer in layer._layers if sublayer is not wrapped]


def own_variables(layer):
    """The variables of a layer itself that `layer.trainable = True` would train.

    Keras's public lists hold those of sublayers too, and none while it is frozen.
    """
    return layer._trainable_variables


@contextlib.contextmanager
def name_scope_of(layer):
    """Variables made inside are called as if the layer had made them in `build`."""
    with contextlib.ExitStack() as scopes:
        for part in (layer.path or layer.name).split("/"):
            scopes.enter_context(keras.name_scope(part))
        yield


def layer_state(layer):
    """The layer's own variables: (those that can train, those that never do)."""
    frozen = getattr(layer, "frozen_kernel", None) if hasattr(layer, "lora") else None
    others = [v for v in layer._non_trainable_variables if v is not frozen]
    return list(layer._trainable_variables), others


def made_by(tensor):
    """The operation that made a symbolic tensor, and the tensors that it made it of.

    Keras's public `Model.operations` do not say which of them makes the outputs.
    """
    history = tensor._keras_history
    node = history.operation._inbound_nodes[history.node_index]
    return history.operation, node.input_tensors


# What Keras's own models keep their layers in says nothing about the layers.
BOOKKEEPING = ("_layers", "_operations", "_functional")


def attributes_of(parent):
    """(name, layer) for the layers that a layer holds by attribute or container.

    Keras keeps the layers that it tracks without the names of the attributes.
    """
    attributes = dict(vars(parent))
    attributes |= attributes.pop("_modules", {})  # where torch keeps submodules
    for name, value in attributes.items():
        if name in BOOKKEEPING:
            continue
        name = name.strip("_")
        if isinstance(value, dict):
            held = value.items()
        elif isinstance(value, (list, tuple)):
            held = enumerate(value)
        else:
            held = [(None, value)]
        for key, layer in held:
            if isinstance(layer, keras.layers.Layer):
                yield (name if key is None else f"{name}/{key}"), layer
