"""Presets of KerasHub tasks whose backbone has adapters."""

import contextlib
import contextvars
import os

import keras

from keras_lora.keras_internals import classes, warn_caller
from keras_lora.keras_internals.layer_state import flatten_layers
from keras_lora.layers import lora_layer
from keras_lora.layers.lora_layer import LoRALayer
from keras_lora.models import sites, tables, training_state

# Ids of layers that are being saved as those of a plain KerasHub task.
_plain: contextvars.ContextVar = contextvars.ContextVar("_plain", default=frozenset())


def plain_class_of(cls):
    """Returns the plain class, for its configuration."""
    return cls.plain_class if issubclass(cls, LoRALayer) else cls.carried_class


def is_registered(cls):
    """Whether a file can name a class; one made at run time cannot be found again."""
    name = keras.saving.get_registered_name(cls)
    return keras.saving.get_registered_object(name) is cls


def save_to_preset(self, preset_dir, *args, **kwargs):
    """Saves under the plain class, by which KerasHub finds the task again."""
    view, outside = self, {}
    if hasattr(self, "backbone"):
        carried = set(map(id, flatten_layers(self.backbone)))
        layers_by_path = sites.layers_by_path(self)
        outside = {p: x for p, x in layers_by_path.items() if id(x) not in carried}
        refuse_adapters_outside(outside)
        view = classes.view_as(self, plain_class_of(type(self)))
    with as_plain_layers(outside.values()):
        plain_class_of(type(self)).save_to_preset(view, preset_dir, *args, **kwargs)
    if view is self and not os.path.exists(os.path.join(preset_dir, "task.json")):
        name = plain_class_of(type(self)).__name__
        warn_caller(
            f"{name}.from_preset cannot load this preset; `from_preset` of a task of "
            "its family can. To load the backbone alone, save a .keras file."
        )
    trained = [
        path
        for path, layer in outside.items()
        if training_state.record_of(layer).base_values
    ]
    if trained:
        warn_caller(
            f"The preset has the trained values of {tables.join(trained)}, not those "
            "from before training, so `remove_lora` on the loaded model cannot restore "
            "them. A .keras file keeps both."
        )


def refuse_adapters_outside(layers):
    for path, layer in layers.items():
        if lora_layer.has_adapters(layer):
            raise ValueError(
                f"A preset cannot hold the adapter of {path!r}, which lies outside the "
                "backbone. Save the model as .keras, or its adapters with "
                "`save_adapter`."
            )


@contextlib.contextmanager
def as_plain_layers(layers):
    """Context in which these layers are saved as those of a plain KerasHub task."""
    token = _plain.set(frozenset(map(id, layers)))
    try:
        yield
    finally:
        _plain.reset(token)


def is_saved_as_plain(layer):
    return id(layer) in _plain.get()


FIELDS = {
    "requires",  # shown in the error of a process that did not import keras_lora
    "layer",
    "model",  # the name of "layer" in files of the first version
    "adapters",
    "weight_adapters",  # of layers with several weights
    "places",
    "quantized",
    "merge_weights",
    "trainable",
    "trainable_before",
    "trained_beside",
}


def plain_part(config):
    """Returns the plain class's configuration, with additions of KerasHub (a dtype)."""
    plain = config.get("layer") or config["model"]
    additions = {key: value for key, value in config.items() if key not in FIELDS}
    return {**plain, "config": {**plain["config"], **additions}}


def plain_float_config(config):
    """Returns a configuration in which all layers are plain and float32.

    A model built from it has the weights of the original class, in their order.
    """
    if isinstance(config, list):
        return [plain_float_config(part) for part in config]
    if not isinstance(config, dict):
        return config
    name = str(config.get("registered_name"))
    if name == "keras_lora>Adapted":
        config = plain_part(config["config"])
    elif name.startswith("keras_lora>LoRA"):
        plain = {**config["config"], "rank": 0, "frozen": []}
        config = {**config, "config": plain}
    plain = {key: plain_float_config(part) for key, part in config.items()}
    if "class_name" in plain and "dtype" in (plain.get("config") or {}):
        plain["config"] |= {"dtype": "float32"}
        if "quantization_config" in plain["config"]:
            plain["config"]["quantization_config"] = None
    return plain
