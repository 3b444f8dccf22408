"""Adapters as files, in the format of Hugging Face PEFT."""

import difflib
import itertools
import json
import math
from collections.abc import Callable
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from keras_lora.adapted_model import mark_adapted
from keras_lora.adapter import LowRankAdapter
from keras_lora.adapter_config import CONFIG
from keras_lora.adapter_config import SETTINGS
from keras_lora.adapter_config import checked_config
from keras_lora.adapter_config import settings
from keras_lora.adapter_config import value_of
from keras_lora.atomic import copy_others
from keras_lora.atomic import replacing
from keras_lora.freezing import freeze_all_but_lora
from keras_lora.keras_internals import compile_again
from keras_lora.keras_internals import layer_state
from keras_lora.keras_internals import synchronize
from keras_lora.keras_internals import trainable_state
from keras_lora.layer_conversion import adopted
from keras_lora.layer_conversion import built_lora_layers
from keras_lora.layer_conversion import lora_class_of
from keras_lora.layer_conversion import lora_layers
from keras_lora.layer_conversion import obstacle
from keras_lora.lora_layer import adapter_dtype
from keras_lora.lora_layer import is_adapted
from keras_lora.paths import layer_paths
from keras_lora.peft_tensors import EMBEDDING
from keras_lora.peft_tensors import LINEAR
from keras_lora.peft_tensors import TORCH_NAMES
from keras_lora.peft_tensors import file_rank
from keras_lora.peft_tensors import from_tensors
from keras_lora.peft_tensors import own_alpha
from keras_lora.peft_tensors import suffixes
from keras_lora.peft_tensors import to_tensors
from keras_lora.peft_tensors import weight_from_tensor
from keras_lora.peft_tensors import weight_to_tensor
from keras_lora.report import Report

TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."


def save_adapter(model, directory, names: Mapping | Callable | None = None):
    """Writes what training changed: A, B, trained biases and heads, and settings.

    Two files, adapter_config.json and adapter_model.safetensors, as PEFT writes
    them: for models that PEFT can hold, PEFT loads them. They are written beside
    `directory` and put in its place in one step.

    Args:
        model: A Keras model that holds LoRA layers.
        directory: Folder for the two files; other files in it stay.
        names: Module paths of another framework for the paths of this one
            (`keras_lora.summary` shows them): a dict, or a function of the path.
            The default writes dots for slashes.

    Raises:
        ValueError: If the model holds no LoRA layer, a factor is not finite, or two
            layers get one name.
    """
    synchronize(model)
    built_lora_layers(model)
    modules = module_names(layer_paths(model), names)
    adapters = {module: layer for module, layer in modules.items() if is_adapted(layer)}
    tensors = {}
    for module, layer in adapters.items():
        for suffix, value in zip(suffixes(layer), to_tensors(layer), strict=True):
            tensors[f"{PREFIX}{module}{suffix}"] = value
    saved, bias = trained_beside(modules, adapters)
    for module, variable in saved:
        name, value = weight_to_tensor(variable)
        infix = ".base_layer" if module in adapters else ""
        tensors[f"{PREFIX}{module}{infix}.{name}"] = np.ascontiguousarray(value)
    for key, value in tensors.items():
        assert_finite(key, value)
    heads = [m for m, v in saved if m not in adapters and v.name != "bias"]
    config = settings(adapters, bias, sorted(set(heads)))
    metadata = {
        "format": "pt",
        "settings": json.dumps({key: config.get(key) for key in SETTINGS}),
    }
    directory = Path(directory).absolute()
    with replacing(directory) as new:
        new.mkdir()
        copy_others(directory, new, [CONFIG, TENSORS])
        safetensors.numpy.save_file(tensors, new / TENSORS, metadata)
        (new / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))


def load_adapter(
    model, directory, names: Mapping | Callable | None = None, trainable: bool = True
) -> Report:
    """Reads an adapter that `save_adapter` or PEFT has written.

    A plain model gets the LoRA layers that the file describes. A model that has
    adapters must have them where the file has them, with the same ranks; its alpha
    becomes the file's. Nothing is traced anew then: a compiled `predict` gives the
    new outputs at its next call. Everything is checked before anything is
    assigned. A thread that predicts meanwhile may see some layers with the old
    factors and some with the new ones.

    Args:
        model: A Keras model that is built.
        directory: Folder with adapter_config.json and adapter_model.safetensors.
        names: As in `save_adapter`.
        trainable: Boolean, whether the adapter goes on training.

    Returns:
        The report of `keras_lora.summary`.

    Raises:
        ValueError: If a file is damaged, the two do not belong together, or they do
            not fit the model: a missing, unexpected, wrongly shaped or non-finite
            tensor. The model is then as before.
        OSError: If a file cannot be read.
    """
    config, tensors = read(Path(directory))
    modules = module_names(layer_paths(model), names)
    found, others = sort_keys(tensors, modules)
    ranks = value_of(config, "rank_pattern", "r", found)
    alphas = value_of(config, "alpha_pattern", "lora_alpha", found)
    use_rslora = config["use_rslora"]
    fresh = not lora_layers(model)
    if fresh:
        layers = {}
        for module in found:
            layer = modules[module]
            lora = LowRankAdapter(
                ranks[module],
                alphas[module],
                0.0 if suffixes_of(found, module) == EMBEDDING else config["dropout"],
                use_rslora,
                dtype=adapter_dtype(layer),
                name="lora",
            )
            layers[module] = layer, lora
        state = trainable_state(model)
        with adopted(model, layers) as undo:
            values = checked_values(modules, found, others, ranks, config)
            undo.pop_all()
        mark_adapted(model, paths_of(model, layers), state)
        heads = [modules[module] for module in config["modules_to_save"]]
        freeze_all_but_lora(model, config["bias"], heads)
        compile_again(model)
    else:
        refuse_other_modules(modules, found)
        values = checked_values(modules, found, others, ranks, config)
    for variable, value in values:
        variable.assign(value)
    for module in found:
        layer = modules[module]
        alpha = own_alpha(layer, alphas[module], use_rslora)
        layer.lora.set_alpha(alpha, use_rslora)
    if not trainable:
        for layer in [modules[m] for m in config["modules_to_save"]]:
            layer.trainable = False
        for layer in lora_layers(model):
            layer.trainable = False
        compile_again(model)
    return Report(model)


def module_names(paths, names) -> dict:
    """Module path -> layer."""
    if names is None:
        names = {}
    get = names if callable(names) else lambda path: names.get(path)
    if not callable(names):
        unknown = [path for path in names if path not in paths]
        if unknown:
            close = difflib.get_close_matches(unknown[0], paths, n=3)
            raise ValueError(
                f"`names` has {unknown[0]!r}, which is no layer's path. "
                f"Close are: {close}."
            )
    modules = {}
    for path, layer in paths.items():
        module = get(path) or path.replace("/", ".")
        if module in modules:
            raise ValueError(f"`names` gives two layers the name {module!r}.")
        modules[module] = layer
    return modules


def trained_beside(modules, adapters):
    """(module, variable) that train beside the factors, and PEFT's word for biases."""
    saved, bias = [], "none"
    factors = {id(layer.lora) for layer in adapters.values()}
    for module, layer in modules.items():
        if id(layer) in factors:
            continue
        trainable, other = layer_state(layer)
        trained = [variable for variable in trainable if variable.trainable]
        saved += [(module, variable) for variable in trained]
        if [v.name for v in trained] == ["bias"]:
            bias = "all" if module not in adapters or bias == "all" else "lora_only"
        elif trained and module not in adapters:
            saved += [(module, variable) for variable in other]
    return saved, bias


def read(directory):
    """The checked configuration, and the tensors as float arrays."""
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{directory / CONFIG} is damaged: {error}") from error
    if (
        not (directory / TENSORS).exists()
        and (directory / "adapter_model.bin").exists()
    ):
        raise ValueError(
            f"{directory} holds adapter_model.bin, a pickle: loading one can run any "
            "program. Save the adapter as safetensors (PEFT does so by default)."
        )
    config = checked_config(config)
    try:
        with safetensors.safe_open(directory / TENSORS, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except OSError:
        raise
    except Exception as error:  # safetensors has its own, and NumPy's pass through
        raise ValueError(f"{directory / TENSORS} is damaged: {error}") from error
    if "settings" in metadata:
        stored = json.loads(metadata["settings"])
        for key in SETTINGS:
            if stored.get(key) != config["file"].get(key):
                raise ValueError(
                    f"{CONFIG} and {TENSORS} do not belong together: {key} is "
                    f"{config['file'].get(key)!r} and {stored.get(key)!r}."
                )
    for key, value in tensors.items():
        if value.dtype.kind in "iub" or value.dtype.kind == "c":
            raise ValueError(f"The tensor {key!r} is not of floats: {value.dtype}.")
        tensors[key] = value if value.dtype == "float64" else value.astype("float32")
        assert_finite(key, tensors[key])
    return config, tensors


def assert_finite(name, values):
    if not np.isfinite(values).all():
        raise ValueError(f"The tensor {name!r} holds values that are not finite.")


def sort_keys(tensors, modules):
    """{module: {suffix: tensor}} for the factors, {key: tensor} for the others."""
    found, others = {}, {}
    for key, value in tensors.items():
        if not key.startswith(PREFIX):
            raise ValueError(f"The tensor {key!r} does not begin with {PREFIX!r}.")
        name = key.removeprefix(PREFIX)
        suffix = next((s for s in LINEAR + EMBEDDING if name.endswith(s)), None)
        if suffix is None:
            others[name] = value
        else:
            found.setdefault(name.removesuffix(suffix), {})[suffix] = value
    if not found:
        raise ValueError(f"{TENSORS} holds no factors of an adapter.")
    for module, pair in found.items():
        layer = modules.get(module)
        if layer is None or not can_hold(layer):
            close = difflib.get_close_matches(
                module, [m for m, x in modules.items() if can_hold(x)], n=3, cutoff=0.3
            )
            raise ValueError(
                f"The file has an adapter for {module!r}, which the model has not"
                f"{' in a form that can be adapted' if layer is not None else ''}. "
                f"Close are: {close}. `names` can map paths to modules."
            )
        if tuple(sorted(pair)) not in (LINEAR, EMBEDDING):
            raise ValueError(
                f"The adapter of {module!r} needs A and B; the file has {sorted(pair)}."
            )
    return found, others


def can_hold(layer):
    if is_adapted(layer):
        return True
    return lora_class_of(type(layer)) is not None and obstacle(layer) is None


def suffixes_of(found, module):
    return tuple(sorted(found[module]))


def refuse_other_modules(modules, found):
    """An adapted model takes a file for the same layers only."""
    own = {module for module, layer in modules.items() if is_adapted(layer)}
    missing, more = sorted(own - set(found)), sorted(set(found) - own)
    if missing or more:
        raise ValueError(
            "The file and the model adapt other layers. Only in the model: "
            f"{missing}. Only in the file: {more}."
        )


def checked_values(modules, found, others, ranks, config):
    """[(variable, value)] for the whole file, of which every shape fits."""
    values = []
    for module, pair in found.items():
        layer = modules[module]
        if suffixes_of(found, module) != suffixes(layer):
            raise ValueError(
                f"{module!r} is a {type(layer).__name__}; the file has "
                f"{sorted(pair)} for it."
            )
        if ranks[module] != file_rank(layer):
            raise ValueError(
                f"The rank of {module!r} is {ranks[module]} in {CONFIG} and "
                f"{file_rank(layer)} in the model."
            )
        a, b = from_tensors(layer, *(pair[s] for s in suffixes(layer)), module)
        values += [(layer.lora.a, a), (layer.lora.b, b)]
    index, needed = {}, {}
    for module, layer in modules.items():
        infix = ".base_layer" if module in found else ""
        for variable in itertools.chain(*layer_state(layer)):
            key = f"{module}{infix}.{TORCH_NAMES.get(variable.name, variable.name)}"
            index[key] = variable
            if module in config["modules_to_save"]:
                needed[key] = variable
    for module in config["modules_to_save"]:
        if module not in modules:
            raise ValueError(f"modules_to_save names {module!r}, which is no layer.")
    for key in needed:
        if key not in others:
            raise ValueError(f"The file has no tensor {PREFIX + key!r}.")
    for key, value in others.items():
        if key.endswith(".base_layer.weight"):
            continue  # PEFT repeats a targeted embedding or head
        if key not in index:
            close = difflib.get_close_matches(key, index, n=3)
            raise ValueError(f"Unexpected tensor {PREFIX + key!r}. Close are: {close}.")
        variable = index[key]
        value = weight_from_tensor(variable, value)
        values.append((variable, fitted(variable, value, PREFIX + key)))
    return values


def fitted(variable, value, key):
    if math.prod(value.shape) != math.prod(variable.shape) or (
        variable.name != "bias" and value.shape != tuple(variable.shape)
    ):
        raise ValueError(
            f"The tensor {key!r} has shape {value.shape}; the model needs "
            f"{tuple(variable.shape)}."
        )
    return value.reshape(variable.shape)


def paths_of(model, layers):
    adapted = {id(layer) for layer, _ in layers.values()}
    return [path for path, layer in layer_paths(model).items() if id(layer) in adapted]
