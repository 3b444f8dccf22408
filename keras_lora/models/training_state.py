"""What trains together with A and B, and its flags and values from before.

Each layer has a record of its own, so that every model that holds the layer can find
it: the one that was adapted, one around it, or one inside.
"""

import dataclasses
import itertools

import numpy as np

from keras_lora.keras_internals import (
    distribution,
    layer_state,
    variable_state,
    warn_caller,
)
from keras_lora.layers import lora_layer
from keras_lora.layers.adapter import LowRankAdapter
from keras_lora.models import sites, tables


@dataclasses.dataclass(frozen=True)
class Record:
    """State of a layer before it was adapted.

    Attributes:
        flags: (trainable, one flag per variable of its own), or None if it was not
            adapted.
        base_values: {index: value} of the variables that train with A and B, by their
            index in `layer_variables`. The value is that from before training, or None
            if it is not known.
    """

    flags: tuple | None = None
    base_values: dict = dataclasses.field(default_factory=dict)


BASE_PREFIX = "base_"  # of base values in files
EMPTY = Record()


def record_of(layer) -> Record:
    return vars(layer).get("_lora_record", EMPTY)


def set_record(layer, record):
    if record == EMPTY:
        vars(layer).pop("_lora_record", None)
    else:
        vars(layer)["_lora_record"] = record


def remember_base_values(layer, variables):
    """Remembers the values of variables that will train with A and B."""
    chosen = set(map(id, variables))
    values = {
        index: np.array(distribution.fetch(variable))
        for index, variable in enumerate(layer_state.layer_variables(layer))
        if id(variable) in chosen
    }
    old = record_of(layer)
    values = {**values, **old.base_values}
    set_record(layer, dataclasses.replace(old, base_values=values))


def remember_what_trains(model_layers):
    """Remembers the values of all variables that the user's flags let train."""
    for layer in model_layers:
        if trained := variables_without_base(layer):
            # If a layer trains, its moving statistics move too.
            statistics = layer_state.non_trainable_variables(layer)
            remember_base_values(layer, [*trained, *statistics])


def warn_of_variables_without_base(model_layers):
    """Warns that values trained in a user's loop cannot be restored."""
    paths = [
        variable.path
        for layer in model_layers
        if record_of(layer).flags is not None
        for variable in variables_without_base(layer)
    ]
    if paths:
        warn_caller(
            f"{tables.join(paths)} can train now, but could not when the adapters "
            "were created, and their values from before are not known. They keep their "
            "present values. `fit` and `train_on_batch` of the adapted model, and "
            "`also_train` of apply_lora, remember the values from before training."
        )


def variables_without_base(layer) -> list:
    """Variables of a layer that can train, but whose base value is not known."""
    if isinstance(layer, LowRankAdapter):
        return []
    base_values = record_of(layer).base_values
    return [
        variable
        for index, variable in enumerate(layer_state.layer_variables(layer))
        if variable.trainable and index not in base_values
    ]


def set_base_value(layer, index, value):
    """Remembers a variable's value from a file; None means that the file has none."""
    variables, old = layer_state.layer_variables(layer), record_of(layer)
    fits = value is not None and index < len(variables)
    if fits and value.shape == variables[index].shape:
        values = {**old.base_values, index: np.array(value)}
        set_record(layer, dataclasses.replace(old, base_values=values))


def trained_variables(layer) -> list:
    """The variables of a layer that train together with A and B, or did."""
    base_values = record_of(layer).base_values
    return [
        variable
        for index, variable in enumerate(layer_state.layer_variables(layer))
        if index in base_values or variable.trainable
    ]


def base_values(layer) -> list:
    """[(variable, its base value)] for what trains together with A and B."""
    variables = layer_state.layer_variables(layer)
    return [
        (variables[index], value)
        for index, value in record_of(layer).base_values.items()
        if value is not None
    ]


def base_value_names(owner, owner_class) -> dict:
    """{name in a file: (layer, index)} for the base values that an owner saves.

    Owners of that class inside it save their own.
    """
    entries, seen = [], set()

    def walk(layer):
        seen.add(id(layer))
        indices = sorted(record_of(layer).base_values)
        entries.extend((layer, index) for index in indices)
        for part in layer_state.sublayers(layer):
            if id(part) not in seen and not isinstance(part, owner_class):
                walk(part)

    walk(owner)
    return {f"{BASE_PREFIX}{place}": entry for place, entry in enumerate(entries)}


def remember_flags(layer):
    if record_of(layer).flags is None:
        flags = [variable.trainable for variable in layer_state.own_variables(layer)]
        record = dataclasses.replace(record_of(layer), flags=(layer.trainable, flags))
        set_record(layer, record)


def trainable_flags(layers_by_path) -> dict:
    """{path: [layer.trainable, one flag per variable of its own]}.

    layers_by_path: Outermost first.
    """
    return {
        path: [layer.trainable, [v.trainable for v in layer_state.own_variables(layer)]]
        for path, layer in layers_by_path.items()
    }


def restore_flags(layers_by_path, flags):
    """Sets flags as from `trainable_flags`; a layer that is gone, or new, is ignored.

    In a copy with other names, layers with variables are matched by their order.
    """
    with_variables = {path: pair for path, pair in flags.items() if pair[1]}
    if with_variables.keys() <= layers_by_path.keys():
        flags = {path: pair for path, pair in flags.items() if path in layers_by_path}
    else:
        present = [
            path for path, x in layers_by_path.items() if layer_state.own_variables(x)
        ]
        flags = dict(zip(present, with_variables.values(), strict=True))
    # Outermost first: setting a layer's flag sets those of the layers inside it.
    for path, pair in flags.items():
        set_flags(layers_by_path[path], *pair)


def set_flags(layer, trainable, flags):
    variable_state.freeze_spectral_norm(layer)
    layer.trainable = trainable
    variables = layer_state.own_variables(layer)
    # Pads or cuts at the front: the kernel, which is first, leaves this list when it is
    # quantized, and returns when it is float.
    flags = ([trainable] * len(variables) + flags)[len(flags) :]
    for variable, flag in zip(variables, flags, strict=True):
        variable.trainable = flag


def freeze_all_but_lora(model, bias="none", also_train=()):
    """Freezes all but A, B, the chosen biases and the layers in `also_train`.

    Nothing is compiled again.
    """
    refuse_quantized(also_train)
    adapted = sites.adapted_sites(model)
    kept = {id(v) for site in adapted for v in layer_state.own_variables(site.lora)}
    with_bias = {
        "none": [],
        "lora_only": dict.fromkeys(site.kernel_owner() for site in adapted),
        "all": layer_state.flatten_layers(model),
    }
    for layer in with_bias[bias]:
        biases = [v for v in layer_state.own_variables(layer) if is_bias(layer, v)]
        remember_base_values(layer, biases)
        kept |= set(map(id, biases))
    for layer in also_train:
        for part in layer_state.flatten_layers(layer):
            remember_base_values(part, layer_state.layer_variables(part))
            kept |= set(map(id, layer_state.own_variables(part)))
    # Outermost first: setting a layer's flag sets those of the layers inside it, which
    # may have several owners, such as a token embedding that a head holds too.
    parts = [
        layer_state.flatten_layers(layer) for layer in layer_state.flatten_layers(model)
    ]
    for layer, *inside in sorted(parts, key=len, reverse=True):
        variables = [v for x in (layer, *inside) for v in layer_state.own_variables(x)]
        variable_state.freeze_spectral_norm(layer)
        layer.trainable = any(id(v) in kept for v in variables)
        for variable in layer_state.own_variables(layer):
            variable.trainable = id(variable) in kept


def refuse_quantized(also_train):
    """Raises if a layer in `also_train` has a quantized kernel."""
    for part in itertools.chain(*map(layer_state.flatten_layers, also_train)):
        if part.quantization_mode and any(
            "int" in variable.dtype for variable in layer_state.layer_variables(part)
        ):
            raise ValueError(
                f"`also_train` names {part.name!r}, whose kernel is quantized to "
                f"{part.quantization_mode!r} and cannot train in full. Leave that "
                "layer out with `filters` of `Model.quantize`, or name it in `target` "
                "to adapt it."
            )


def freeze_adapters(layers_by_path):
    """Freezes A, B and the variables that trained with them."""
    for layer in layers_by_path.values():
        if lora_layer.has_adapters(layer) or record_of(layer).base_values:
            layer.trainable = False


def train_adapters(layers_by_path):
    """Lets A, B and the variables that trained with them train; other flags stay.

    layers_by_path: Outermost first, the model as "".
    """
    flags = trainable_flags(layers_by_path)
    for path, layer in layers_by_path.items():
        if isinstance(layer, LowRankAdapter):
            del flags[path]  # set together with its layer
            continue
        indices = record_of(layer).base_values
        variables = enumerate(layer_state.layer_variables(layer))
        kept = {id(v) for index, v in variables if index in indices}
        if lora_layer.has_adapters(layer) or kept:
            own = layer_state.own_variables(layer)
            flags[path] = [True, [v.trainable or id(v) in kept for v in own]]
            for owner in owners_of(path):
                if owner in flags:
                    flags[owner][0] = True
    restore_flags(layers_by_path, flags)


def owners_of(path):
    """Returns the owners of a path: "", "a" and "a/b" for "a/b/c"."""
    parts = path.split("/")
    return ["/".join(parts[:count]) for count in range(len(parts))]


def is_bias(layer, variable):
    """Whether a variable is a bias in the sense of torch and PEFT.

    Except beta of batch normalization, whose statistics would move if it trained.
    """
    if variable.name == "beta":
        return not layer_state.non_trainable_variables(layer)
    return variable.name == "bias"
