"""Records the state of layers before they were adapted, and what trains with A and B.

Each layer has its own record, so that every model that holds the layer can find it: the
one that was adapted, one around it, or one inside.
"""

import dataclasses
import itertools

import numpy as np

from keras_lora.keras_internals import distribution, warn_caller
from keras_lora.keras_internals.layers import (
    freeze_spectral_norm,
    layer_state,
    own_variables,
    sublayers,
)
from keras_lora.layers.adapter import LowRankAdapter
from keras_lora.models import tables


@dataclasses.dataclass(frozen=True)
class Record:
    """State of a layer before it was adapted.

    Attributes:
    before: (trainable, one flag per variable of its own) before `apply_lora`.
    base: {index: value} of the variables that train with A and B, by their index in
        `state_of`: their values from before, None if they are unknown.
    """

    before: tuple | None = None
    base: dict = dataclasses.field(default_factory=dict)


BASE = "base_"
EMPTY = Record()


def record_of(layer) -> Record:
    return vars(layer).get("_lora_record", EMPTY)


def set_record(layer, record):
    if record == EMPTY:
        vars(layer).pop("_lora_record", None)
    else:
        vars(layer)["_lora_record"] = record


def state_of(layer) -> list:
    """The variables of a layer itself, without a frozen kernel."""
    return list(itertools.chain(*layer_state(layer)))


def remember_flags(layer):
    if record_of(layer).before is None:
        flags = [variable.trainable for variable in own_variables(layer)]
        before = (layer.trainable, flags)
        set_record(layer, dataclasses.replace(record_of(layer), before=before))


def remember_base(layer, variables):
    """Remembers the values of variables that will train besides A and B."""
    chosen = set(map(id, variables))
    base = {
        index: np.array(distribution.fetch(variable))
        for index, variable in enumerate(state_of(layer))
        if id(variable) in chosen
    }
    old = record_of(layer)
    set_record(layer, dataclasses.replace(old, base={**base, **old.base}))


def remember_what_trains(layers):
    """Remembers the values of all variables that the user's flags let train."""
    for layer in layers:
        if trained := unremembered(layer):
            # If a layer trains, its moving statistics move too.
            remember_base(layer, [*trained, *layer_state(layer)[1]])


def warn_of_unremembered(layers):
    """Warns that values trained in a user's loop cannot be restored."""
    found = [
        variable.path
        for layer in layers
        if record_of(layer).before is not None
        for variable in unremembered(layer)
    ]
    if found:
        warn_caller(
            f"{tables.listed(found)} can train now, but could not when the adapters "
            "were created, and their values from before are not known. They keep their "
            "present values. `fit` and `train_on_batch` of the adapted model, and "
            "`also_train` of apply_lora, remember the values from before training."
        )


def unremembered(layer) -> list:
    """Variables of a layer that can train, but have no remembered value."""
    if isinstance(layer, LowRankAdapter):
        return []
    base = record_of(layer).base
    return [
        variable
        for index, variable in enumerate(state_of(layer))
        if variable.trainable and index not in base
    ]


def set_base(layer, index, value):
    """Remembers a variable's value from a file; None means that the file has none."""
    state, old = state_of(layer), record_of(layer)
    if value is not None and index < len(state) and value.shape == state[index].shape:
        base = {**old.base, index: np.array(value)}
        set_record(layer, dataclasses.replace(old, base=base))


def trained_variables(layer) -> list:
    """The variables of a layer that train together with A and B, or did."""
    base = record_of(layer).base
    return [
        variable
        for index, variable in enumerate(state_of(layer))
        if index in base or variable.trainable
    ]


def base_values(layer) -> list:
    """[(variable, its base value)] for what trains together with A and B."""
    state = state_of(layer)
    return [
        (state[index], value)
        for index, value in record_of(layer).base.items()
        if value is not None
    ]


def base_names(owner, owner_class) -> dict:
    """{name in a file: (layer, index)} for the remembered values that an owner saves.

    Owners of that class inside it save their own.
    """
    found, seen = [], set()

    def walk(layer):
        seen.add(id(layer))
        found.extend((layer, index) for index in sorted(record_of(layer).base))
        for part in sublayers(layer):
            if id(part) not in seen and not isinstance(part, owner_class):
                walk(part)

    walk(owner)
    return {f"{BASE}{place}": entry for place, entry in enumerate(found)}


def trainable_state(layers) -> dict:
    """{path: [layer.trainable, one flag per variable of its own]}.

    layers: path -> layer, outermost first.
    """
    return {
        path: [layer.trainable, [v.trainable for v in own_variables(layer)]]
        for path, layer in layers.items()
    }


def restore_trainable_state(layers, state):
    """Restores flags; layers that came or went since, such as a tokenizer, are ignored.

    In a copy with other names, layers with variables are matched by their order.
    """
    with_variables = {path: flags for path, flags in state.items() if flags[1]}
    if with_variables.keys() <= layers.keys():
        state = {path: flags for path, flags in state.items() if path in layers}
    else:
        own = [path for path, layer in layers.items() if own_variables(layer)]
        state = dict(zip(own, with_variables.values(), strict=True))
    # Outermost first: setting a layer's flag sets those of the layers inside it.
    for path, (trainable, flags) in state.items():
        set_flags(layers[path], trainable, flags)


def set_flags(layer, trainable, flags):
    freeze_spectral_norm(layer)
    layer.trainable = trainable
    variables = own_variables(layer)
    # A kernel that was quantized since, or is float again, comes first.
    flags = ([trainable] * len(variables) + flags)[len(flags) :]
    for variable, flag in zip(variables, flags, strict=True):
        variable.trainable = flag
