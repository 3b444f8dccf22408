"""Loads an adapter from PEFT's files into a model."""

import json
import os
from collections.abc import Callable, Mapping

import keras

from keras_lora.files import config, disk, matching
from keras_lora.files.folder import Adapter
from keras_lora.files.names import modules_of, refuse_tied_head
from keras_lora.keras_internals import compiled, distribution, processes
from keras_lora.keras_internals.layer_state import layer_variables
from keras_lora.layers import lora_layer, token_rows
from keras_lora.layers.adapter import LowRankAdapter
from keras_lora.models import apply, sites, training_state
from keras_lora.models.report import Report

FILES_DIFFER = (
    "The processes have read different files under this name. Give all of them the "
    "same files, on a shared disk or as copies."
)


def load_adapter(
    model: keras.layers.Layer,
    directory: "str | os.PathLike | Adapter",
    names: str | Mapping | Callable | None = None,
    trainable: bool = True,
) -> Report:
    """Loads an adapter that `save_adapter` or PEFT has written.

    A plain model gets the LoRA layers that the file describes. A model with adapters
    must have them in the same layers as the file, with the same ranks. It adopts the
    file's alpha, and no function is traced again: the next call of a compiled `predict`
    gives the new outputs. Everything is checked before anything is assigned. A thread
    that predicts at the same time may see old factors in some layers and new ones in
    others.

    Heads and biases that trained with another adapter and are not in this file get back
    their values from before that training.

    If the model is distributed over several processes, all of them must make
    this call, and read the same files.

    Args:
        model: A Keras model that is built.
        directory: Folder with adapter_config.json and adapter_model.safetensors, an
            `Adapter`, or files of kohya or mlx (see `Adapter.read`).
        names: As in `save_adapter`. With "transformers", the prefix of the names, and
            whether they are from before transformers 5, are taken from the file.
        trainable: Boolean, whether the adapter can be trained further.

    Returns:
        A report like that of `apply_lora`.

    Raises:
        ValueError: If a file is damaged, the two do not belong together, or a tensor
            is missing, unexpected, not finite or of a shape that does not fit the
            model; or inside `merged` or `disabled`. The model is left unchanged.
        OSError: If a file cannot be read, on any process that holds the model.
        RuntimeError: If another process does not call within half a minute.

    Examples:
        >>> keras_lora.save_adapter(model, "adapter")
        >>> keras_lora.remove_lora(model)
        >>> report = keras_lora.load_adapter(model, "adapter")
        >>> [row.rank for row in report]
        [8]
    """
    paths = sites.Paths(model)
    sites.refuse_unbuilt(model)
    return load_into(paths, read_for(model, directory), names, trainable)


def read_for(model, directory) -> Adapter:
    """Reads an adapter, the same one on every process that holds the model."""

    def read():
        if isinstance(directory, Adapter):
            return directory
        return Adapter.read(directory)

    processes.barrier(model)
    return processes.run_on_all(model, read, fingerprint, FILES_DIFFER)


def fingerprint(adapter) -> str:
    """Returns a text that is equal for equal adapters."""
    settings = {
        "settings": adapter.config,
        "slices": adapter.slices,
        "starts": sorted(adapter.starts),
    }
    texts = {key: json.dumps(value, sort_keys=True) for key, value in settings.items()}
    return disk.digest(adapter.tensors, texts)


def load_into(paths, adapter, names=None, trainable=True) -> Report:
    """Loads an `Adapter` into the model of some `Paths`."""
    model, layers_and_model, notes = paths.model, paths.with_model, []
    file = matching.match(adapter, modules_of(paths, names, adapter))
    refuse_tied_head(model, names, file.sites | file.heads)
    if any(map(lora_layer.has_adapters, layers_and_model.values())):
        sites.sites_outside_contexts(model)
        matching.refuse_different_modules(file)
        values = matching.values_for(file)
    else:
        adapters = {
            site: file.options_of(module) for module, site in file.sites.items()
        }
        for module, site in file.tables.items():
            adapters[site] = {token_rows.KEYWORD: file.rows[module][0]}
        with apply.adapt_layers(paths, adapters) as change:
            values = matching.values_for(file)
            heads = list(file.heads.values())
            training_state.freeze_all_but_lora(model, file.config["bias"], heads)
            notes += change.commit()
    config.remember_facts(model, adapter.config)
    values += unread_base_values(layers_and_model, values)
    for variable, value in values:
        distribution.assign(variable, value)
    for module, site in file.sites.items():
        settings = file.settings_of(module)
        site.lora.set_alpha(settings.alpha, settings.use_rslora)
    flags = training_state.trainable_flags(layers_and_model)
    if trainable:
        training_state.train_adapters(layers_and_model)
    else:
        training_state.freeze_adapters(layers_and_model)
    if training_state.trainable_flags(layers_and_model) != flags:
        notes += compiled.compile_again(model)
    return Report(paths, notes=notes)


def unread_base_values(layers, values):
    """Base values of variables that train with A and B but are not in the file."""
    read = {id(variable) for variable, _ in values}
    unread = []
    for layer in layers.values():
        if not isinstance(layer, LowRankAdapter):
            variables = layer_variables(layer)
            training_state.remember_base_values(
                layer, [v for v in variables if id(v) in read]
            )
            base_values = training_state.base_values(layer)
            unread += [(v, x) for v, x in base_values if id(v) not in read]
    return unread
