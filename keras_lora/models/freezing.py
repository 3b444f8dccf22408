"""Which variables train together with the adapters."""

import itertools

import keras

from keras_lora.keras_internals import warn_caller
from keras_lora.keras_internals.layers import (
    flatten_layers,
    freeze_spectral_norm,
    layer_state,
    own_variables,
)
from keras_lora.layers import lora_layer, settings
from keras_lora.layers.adapter import LowRankAdapter
from keras_lora.models import record
from keras_lora.models.change import adapting
from keras_lora.models.sites import built_sites, layer_paths


def mark_only_lora_as_trainable(model: keras.layers.Layer, bias: str = "none"):
    """Freezes everything except A, B and the chosen biases.

    Layers in which nothing trains are frozen as layers, so that batch
    normalization keeps its moving statistics. A model that was compiled is
    compiled again with the same settings; its optimizer starts afresh.

    Args:
        model: Any Keras model that holds LoRA layers.
        bias: "none": no bias trains. "lora_only": the biases of adapted layers
            train. "all": all biases train, also beta of normalization layers, but
            not of batch normalization.

    Raises:
        ValueError: If `bias` has another value, or there is no LoRA layer.

    Examples:
        >>> keras_lora.mark_only_lora_as_trainable(model, bias="lora_only")
        >>> len(model.trainable_variables)  # A, B and the bias
        3
    """
    settings.checked_bias(bias)
    built_sites(model)
    with adapting(model, layer_paths(model), {}) as change:
        freeze_all_but_lora(model, bias)
        notes = change.keep()
    for note in notes:
        warn_caller(note)


def freeze_all_but_lora(model, bias="none", also_train=()):
    """Freezes all but A, B, the chosen biases and the layers in `also_train`.

    Nothing is compiled again.
    """
    refuse_quantized(also_train)
    sites = built_sites(model)
    kept = {id(v) for site in sites for v in own_variables(site.lora)}
    own = list(dict.fromkeys(site.kernel_owner() for site in sites))
    for layer in {"none": [], "lora_only": own, "all": flatten_layers(model)}[bias]:
        biases = [v for v in own_variables(layer) if is_bias(layer, v)]
        record.remember_base(layer, biases)
        kept |= set(map(id, biases))
    for layer in also_train:
        for part in flatten_layers(layer):
            record.remember_base(part, record.state_of(part))
            kept |= {id(v) for v in own_variables(part)}
    # Outermost first: setting a layer's flag sets those of the layers inside it, which
    # may have several owners, such as a token embedding that a head holds too.
    parts = [list(flatten_layers(layer)) for layer in flatten_layers(model)]
    for layer, *inside in sorted(parts, key=len, reverse=True):
        variables = [v for part in (layer, *inside) for v in own_variables(part)]
        freeze_spectral_norm(layer)
        layer.trainable = any(id(v) in kept for v in variables)
        for variable in own_variables(layer):
            variable.trainable = id(variable) in kept


def refuse_quantized(also_train):
    """Raises if a layer in `also_train` has a quantized kernel."""
    for part in itertools.chain(*map(flatten_layers, also_train)):
        if (
            any("int" in v.dtype for v in record.state_of(part))
            and part.quantization_mode
        ):
            raise ValueError(
                f"`also_train` names {part.name!r}, whose kernel is quantized to "
                f"{part.quantization_mode!r} and cannot train in full. Leave that "
                "layer out with `filters` of `Model.quantize`, or name it in `target` "
                "to adapt it."
            )


def freeze_adapters(layers):
    """Freezes A, B and the variables that trained with them."""
    for layer in layers.values():
        if lora_layer.has_adapters(layer) or record.record_of(layer).base:
            layer.trainable = False


def train_adapters(layers):
    """Lets A, B and the variables that trained with them train; other flags stay.

    layers: path -> layer, outermost first, the model as "".
    """
    record.restore_trainable_state(layers, trained_state(layers))


def trained_state(layers):
    """The flags with which adapters, and what trained with them, train."""
    state = record.trainable_state(layers)
    for path, layer in layers.items():
        if isinstance(layer, LowRankAdapter):
            del state[path]  # set together with its layer
            continue
        base = record.record_of(layer).base
        kept = {
            id(v) for index, v in enumerate(record.state_of(layer)) if index in base
        }
        flags = [v.trainable or id(v) in kept for v in own_variables(layer)]
        if lora_layer.has_adapters(layer) or kept:
            state[path] = [True, flags]
            for owner in owners_of(path):
                if owner in state:
                    state[owner][0] = True
    return state


def owners_of(path):
    """Returns the owners of a path: "", "a" and "a/b" for "a/b/c"."""
    parts = path.split("/")
    return ["/".join(parts[:count]) for count in range(len(parts))]


def is_bias(layer, variable):
    """Whether a variable is a bias in the sense of torch and PEFT.

    Except beta of batch normalization, whose statistics would move if it trained.
    """
    if variable.name == "beta":
        return not layer_state(layer)[1]
    return variable.name == "bias"
