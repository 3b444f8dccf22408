"""The state of built layers: weights, sublayers, policies."""

import collections
import contextlib
import functools
import sys

import keras

from keras_lora.keras_internals import private_names, probes
from keras_lora.keras_internals.variable_state import is_frozen_kernel, unlocked

LORA_LAYER = "keras_lora.layers.lora_layer", "LoRALayer"


def validate_model(model):
    """Raises if this is not a model, or Keras lacks what adapters need."""
    probes.require(private_names.MODELS)
    if not isinstance(model, keras.layers.Layer):
        raise ValueError(
            "`model` must be a Keras model or layer. Received: "
            f"{type(model).__name__}, {str(model)[:99]!r}."
        )


def refuse_reloaded_class(layer):
    """Raises ValueError for a layer that another copy of this package has adapted.

    After a second import, or Jupyter's autoreload, the classes of the layers differ
    from those that the functions know.
    """
    present = getattr(sys.modules.get(LORA_LAYER[0]), LORA_LAYER[1], None)
    for base in type(layer).__mro__:
        if (base.__module__, base.__name__) == LORA_LAYER and base is not present:
            raise ValueError(
                f"The layer {layer.name!r} was adapted by another copy of keras_lora: "
                "the package was imported or reloaded a second time since. Restart "
                "Python, without autoreload for this package, build the model and load "
                "its adapter. Nothing was changed or written."
            )


def flatten_layers(model):
    """Returns the model itself and every layer inside it, each once.

    Keras's public `layers` exists only for models and has one level. The order is that
    of Keras's own walk, by which KerasHub's files number layers.
    """
    validate_model(model)
    refuse_reloaded_class(model)
    layers, waiting = {id(model): model}, collections.deque(model._layers)
    while waiting:
        layer = waiting.popleft()
        if id(layer) not in layers:
            refuse_reloaded_class(layer)
            layers[id(layer)] = layer
            waiting.extendleft(layer._layers)
    return list(layers.values())


def attach(layer, name, sublayer):
    """Attaches a sublayer to a layer, even if the layer is built."""
    with unlocked(layer):
        setattr(layer, name, sublayer)
        # Because torch keeps modules where a class default hides them.
        vars(layer)[name] = sublayer


def detach(layer, name):
    """Removes a sublayer; Keras would keep tracking one that is only deleted."""
    with unlocked(layer):
        layer._tracker.untrack(getattr(layer, name))
        delattr(layer, name)
        vars(layer).pop(name, None)


def take_own_policy(layer):
    """Replaces a map of policies on a quantized layer by the layer's own policy.

    Layers of loaded models have the map, and Keras would save them as float layers.
    """
    if isinstance(layer.dtype_policy, keras.dtype_policies.DTypePolicyMap):
        layer._dtype_policy = layer.dtype_policy[layer.path]


class Leaf:
    """Mixin of a layer in which Keras finds no sublayers.

    Before Keras 3.16, `Model.quantize` skips every layer that has one.
    """

    is_leaf = True  # False if a layer holds others than its adapter

    if not hasattr(keras.Model, "quantization_summary"):

        def _flatten_layers(self, include_self=True, recursive=True):
            if not self.is_leaf:
                return super()._flatten_layers(include_self, recursive)
            return [self] if include_self else []


def refresh_torch_parameters(layers):
    """Updates the parameters of layers that torch sees."""
    if keras.backend.backend() == "torch":
        for layer in layers:
            layer.torch_params.clear()
            layer.torch_params.update({v.path: v.value for v in layer.variables})


def sublayers(layer):
    """Returns the layers that a layer holds itself, in order.

    Only models have a public list of them.
    """
    return list(layer._layers)


def own_variables(layer):
    """Returns the layer's own variables that `layer.trainable = True` would train.

    Keras's public lists include those of sublayers, and are empty for a frozen layer.
    """
    return layer._trainable_variables


@contextlib.contextmanager
def name_scope_of(layer):
    """Context in which variables are named as if created in the layer's `build`."""
    with name_scopes(layer.path or layer.name):
        yield


@contextlib.contextmanager
def name_scopes(path):
    """Context in which the paths of variables begin with a path."""
    with contextlib.ExitStack() as scopes:
        for part in filter(None, path.split("/")):
            scopes.enter_context(keras.name_scope(part))
        yield


def layer_variables(layer) -> list:
    """Returns a layer's own variables, without the frozen kernels of adapters."""
    return [*layer._trainable_variables, *non_trainable_variables(layer)]


def non_trainable_variables(layer) -> list:
    """Returns a layer's own variables that never train, such as moving statistics."""
    return [v for v in layer._non_trainable_variables if not is_frozen_kernel(v)]


# Attributes in which Keras lists variables and layers without names.
VARIABLE_LISTS = ("_trainable_variables", "_non_trainable_variables", "_layers")


@functools.cache
def bookkeeping() -> set:
    """Attributes of Keras's own models, whose names do not describe layers."""
    identity = keras.layers.Identity(name="identity")
    inputs = keras.Input((1,), name="inputs")
    models = (
        keras.Sequential([inputs, identity], name="sequential"),
        keras.Model(inputs, identity(inputs), name="functional"),
    )
    return {name for model in models for name in vars(model)}


def attributes_of(parent):
    """Yields (name, layer) for layers in attributes, or in containers there.

    Keras tracks layers without the names of their attributes.
    """
    attributes = dict(vars(parent))
    attributes |= attributes.pop("_modules", {})  # submodules on torch
    for name, value in attributes.items():
        if name in bookkeeping():
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


def weight_places(layer) -> dict:
    """Name -> keys, for a layer's own weights of two axes or more.

    The keys lead from the layer to the weight: names of attributes, and positions or
    keys in lists or dicts. Weights that never train and weights of sublayers are left
    out.
    """
    places = named_places(weights_held(layer))
    return {name: keys for name, (keys, *_) in places.items()}


def named_places(held) -> dict:
    """Name -> the keys to each place of a weight, for (prefix, keys, weight)."""
    names: dict = {}
    found: dict = {}
    for prefix, keys, variable in held:
        if id(variable) not in names:
            name, count = prefix + variable.name, 1
            while name in found:
                name, count = f"{prefix}{variable.name}_{count}", count + 1
            names[id(variable)], found[name] = name, []
        found[names[id(variable)]].append(keys)
    return found


def unheld_weights(layer) -> list:
    """Names a layer's own matrices that no attribute, list or dict holds."""
    held = {id(variable) for *_, variable in weights_held(layer)}
    rest = [v for v in filter(is_matrix, own_variables(layer)) if id(v) not in held]
    if not rest:
        return []
    theirs = variables_inside(layer)
    return [variable.name for variable in rest if id(variable) not in theirs]


def variables_inside(layer) -> set:
    """Ids of the variables of all layers inside a layer."""
    parts = [part for part in flatten_layers(layer) if part is not layer]
    return {id(v) for part in parts for v in part.variables}


def is_matrix(variable):
    return len(variable.shape) > 1 and "float" in variable.dtype


def weights_held(layer, prefix="", keys=()) -> list:
    """(prefix, keys, weight) for each place of a weight, as in `weight_places`.

    Args:
        layer: A layer.
        prefix: The beginning of its weights' names.
        keys: The keys that lead to the layer.
    """
    kernels = filter(is_frozen_kernel, layer._non_trainable_variables)
    own = set(map(id, filter(is_matrix, [*own_variables(layer), *kernels])))
    if not own:
        return []  # as for most layers, without a look at their attributes
    # A wrapper may hold the weights of its layer too.
    own -= variables_inside(layer)
    found: list = []

    def look(value, keys):
        if isinstance(value, keras.Variable):
            if id(value) in own:
                found.append((prefix, keys, value))
        elif isinstance(value, dict):
            for key, each in value.items():
                look(each, (*keys, key))
        elif isinstance(value, (list, tuple)):
            for place, each in enumerate(value):
                look(each, (*keys, place))

    for name, value in vars(layer).items():
        if not (name in VARIABLE_LISTS or name.startswith("_self_")):  # TensorFlow's
            look(value, (*keys, name))
    return found


def kernel_variables(layer) -> dict:
    """Attribute -> variable, for all of a layer's own variables but its bias.

    A quantized layer has integers, scales, zeros and groups.
    """
    return {
        name: value
        for name, value in vars(layer).items()
        if isinstance(value, keras.Variable) and name != "bias"
    }


def exchange_variables(layer, other):
    """Gives a quantized layer the kernels of a float one like it."""
    with unlocked(layer):
        for name in kernel_variables(layer):
            delattr(layer, name)
        for name, variable in kernel_variables(other).items():
            setattr(layer, name, variable)
    order = [variable.name for variable in other._trainable_variables]
    layer._trainable_variables.sort(key=lambda variable: order.index(variable.name))
    layer._is_quantized = False
    layer.quantization_config = None


def drop_float_kernel(layer):
    """Ends Keras's calibration: deletes the float kernel beside the integers."""
    variables = kernel_variables(layer).items()
    with unlocked(layer):
        for name in [
            x for x, v in variables if v.name == "kernel" and "int" not in v.dtype
        ]:
            delattr(layer, name)
        if hasattr(layer, "calibration_pending"):  # since Keras 3.16
            layer.calibration_pending = False
        else:
            setattr(layer, f"is_{layer.quantization_mode}_calibrated", True)


@contextlib.contextmanager
def listed_instead(layer, old, new):
    """Context in which a layer lists one variable instead of another as a weight."""
    lists = (layer._trainable_variables, layer._non_trainable_variables)
    tracked = next(x for x in lists if any(v is old for v in x))
    replace(tracked, old, new)
    try:
        yield
    finally:
        replace(tracked, new, old)


def replace(tracked, old, new):
    place = next(index for index, v in enumerate(tracked) if v is old)
    list.__setitem__(tracked, place, new)


@contextlib.contextmanager
def unlisted(layer, sublayer):
    """Context in which a layer does not list one of its sublayers."""
    place = next(n for n, inner in enumerate(layer._layers) if inner is sublayer)
    list.pop(layer._layers, place)
    try:
        yield
    finally:
        list.insert(layer._layers, place, sublayer)
