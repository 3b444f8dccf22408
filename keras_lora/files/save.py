"""Writes a model's adapter as PEFT's files."""

import collections
import os
from collections.abc import Callable, Mapping

import keras

from keras_lora.files import checked_config, slices
from keras_lora.files.config import model_facts, settings
from keras_lora.files.folder import Adapter
from keras_lora.files.names import module_names, refuse_tied_head, refuse_unnamed
from keras_lora.files.tensors import (
    file_alpha,
    kernel_to_tensor,
    to_tensors,
    torch_name,
    weight_to_tensor,
)
from keras_lora.keras_internals import layers, processes, warn_caller
from keras_lora.layers import lora_layer, token_rows
from keras_lora.layers.adapter import LowRankAdapter
from keras_lora.models import sites, training_state


def save_adapter(
    model: keras.layers.Layer,
    directory: str | os.PathLike,
    names: str | Mapping | Callable | None = None,
    task_type: str | None = None,
    base_model_name_or_path: str | None = None,
):
    """Saves what training changed: A, B, trained biases and heads, and settings.

    Writes two files, adapter_config.json and adapter_model.safetensors, in PEFT's
    format. PEFT loads them into every model that it can adapt. An interrupted save
    leaves the old adapter or the new one.

    If the model is distributed over several processes, all of them must make
    this call: the first one writes, and the others return once it has.

    Args:
        model: A Keras model that holds LoRA layers.
        directory: Folder for the two files; other files in it are kept.
        names: Module names in another framework for the paths of this model
            (`keras_lora.summary` shows them): a dict, or a function of the path. For
            a KerasHub model, "transformers" takes the names from KerasHub's
            converters, "transformers4" those from before transformers 5, and the
            name of a family, such as "bert", refuses models of other families. Layers
            that are one module there share its name: "qkv[0/3]" is the first third of
            its outputs. By default, slashes become dots.
        task_type: How PEFT should treat the model, such as "SEQ_CLS" or
            "CAUSAL_LM". The default is that of the adapter that was loaded, if any.
        base_model_name_or_path: Where PEFT finds the base model. The same default.

    Raises:
        ValueError: If the model holds no LoRA layer, a factor is not finite, two
            layers get the same name, or KerasHub has no converter for the model.
        OSError: If a file cannot be written; raised on every process.
        RuntimeError: If another process does not call within half a minute.

    Examples:
        >>> keras_lora.save_adapter(model, "adapter")
        >>> sorted(os.listdir("adapter"))
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    given = {
        "task_type": task_type,
        "base_model_name_or_path": base_model_name_or_path,
    }
    adapter = adapter_of(model, names)
    adapter.config.update(model_facts(model, given))
    writes = processes.is_writer(model)
    processes.on_all(model, lambda: writes and adapter.save(directory))


def adapter_of(model, names=None, trained=None) -> Adapter:
    """Returns the adapter of a model, as it would be saved.

    trained: (module, variable) to save with the factors; by default those that train
    or trained together with them.
    """
    paths = sites.layer_paths(model)
    modules = module_names(paths, names, model)
    sites.built_sites(model)
    adapters = {
        m: site for m, site in modules.sites.items() if lora_layer.is_adapted(site)
    }
    if trained is None:
        trained = trained_beside(modules, adapters)
    changed = {
        **{module: modules[module] for module, _ in trained},
        # A tied head uses the trained rows, in PEFT too.
        **{m: s for m, s in adapters.items() if s.lora.keyword != token_rows.KEYWORD},
    }
    refuse_tied_head(model, names, changed)
    return adapter_from(modules, adapters, trained)


def adapter_from(modules, adapters, trained) -> Adapter:
    """Returns an `Adapter` with the values that layers have trained.

    Args:
        modules: Module -> layer, of a whole model.
        adapters: The modules that have an adapter.
        trained: (module, variable) to save with the factors.
    """
    tables = {m: s for m, s in adapters.items() if s.lora.keyword == token_rows.KEYWORD}
    adapters = {m: s for m, s in adapters.items() if m not in tables}
    refuse_unnamed(modules, tables)
    stacks = modules.parameters.keys() & {slices.without_slice(m) for m in adapters}
    parameters = {module: modules.parameters[module] for module in sorted(stacks)}
    refuse_parameters(adapters, parameters)
    tensors = checked_config.row_tensors(tables)
    for module, layer in adapters.items():
        tensors |= {module + suffix: x for suffix, x in to_tensors(layer).items()}
    tensors |= of_unadapted_slices(modules, adapters)
    refuse_unnamed(modules, adapters)
    use_rslora = all(layer.lora.use_rslora for layer in adapters.values())
    use_rslora = use_rslora and bool(adapters)
    ranks = {module: layer.lora.file_rank for module, layer in adapters.items()}
    alphas = {m: file_alpha(layer, use_rslora) for m, layer in adapters.items()}
    layout = slices.fuse(tensors, ranks, alphas, use_rslora, modules.places)
    others = {
        (module, torch_name(modules[module], variable)): weight_to_tensor(
            modules[module], variable, module in modules.inputs_first
        )
        for module, variable in trained
    }
    refuse_unreadable(ranks, others)
    fuse_others(others, modules)
    for (module, name), value in others.items():
        infix = ".base_layer" if module in ranks else ""
        tensors[f"{module}{infix}.{name}"] = value
    names_of = collections.defaultdict(list)
    for module, variable in trained:
        names_of[module].append(torch_name(modules[module], variable))
    biases = {
        slices.without_slice(m) for m, found in names_of.items() if found == ["bias"]
    }
    bias = "all" if biases - ranks.keys() else "lora_only"
    config = settings(
        ranks,
        alphas,
        use_rslora,
        lora_dropout=file_dropout(adapters, parameters),
        bias=bias if biases else None,
        modules_to_save=sorted(
            {module for module, _ in others} - ranks.keys() - biases
        ),
        fan_in_fan_out=bool(modules.inputs_first),
        parameters=parameters,
        **method_of(adapters),
        **{token_rows.KEYWORD: {m: list(s.lora.indices) for m, s in tables.items()}},
    )
    starts = sorted(m for m, layer in adapters.items() if layer.lora.has_start)
    return Adapter(tensors, config, layout, starts=starts)


# Parts of PEFT's keys that are not module names.
PARTS = ["lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "base_layer"]
PARTS += ["lora_magnitude_vector", "modules_to_save", "original_module"]


def refuse_unreadable(adapted, others):
    """Raises ValueError for modules whose keys would be read as another module's.

    adapted: The modules that have factors. others: (module, name) of the variables
    that trained with them.
    """
    whole = {module for module, _ in others} - adapted.keys()
    for module in [*adapted, *whole]:
        inner = module.split(".")[1:]
        if "modules_to_save" in inner or (
            inner and module in whole and inner[-1] in PARTS
        ):
            raise ValueError(
                f"{module!r} has a name like a part of PEFT's keys, so its tensors "
                "would be read as another module's. Give it another name with "
                "`names`, when you save and when you load."
            )


def refuse_parameters(adapters, parameters):
    """Raises for DoRA of parameters, which PEFT does not support."""
    for module, layer in adapters.items():
        if slices.without_slice(module) in parameters and layer.lora.keyword:
            raise ValueError(
                f"The adapter of {module!r} has {layer.lora.keyword}, which PEFT does "
                "not support for a parameter. Leave out `names` for a file that only "
                "keras_lora reads, or merge the adapter."
            )


def file_dropout(adapters, parameters):
    """The dropout for the file: 0 if it adapts a parameter, as PEFT requires."""
    dropout = max([0.0, *(layer.lora.dropout for layer in adapters.values())])
    if dropout and parameters:
        warn_caller(
            f"The file has lora_dropout=0.0 instead of {dropout}: PEFT supports no "
            "dropout where it adapts a parameter, here "
            f"{sorted(parameters.values())[0]!r}."
        )
        return 0.0
    return dropout


def method_of(adapters) -> dict:
    """The keyword of a method other than LoRA, the same for all adapters."""
    adapters = [layer.lora for layer in adapters.values()]
    words = {lora.keyword for lora in adapters}
    if len(words) > 1:
        raise ValueError(
            f"The model has adapters of several methods, {sorted(map(str, words))}; a "
            "file can have only one. Merge or remove those of one method."
        )
    return {word: True for word in words if word}


def of_unadapted_slices(modules, adapters) -> dict:
    """Returns the tensors of slices without adapters, for methods that need them."""
    tensors = {}
    for module, (names, _) in slices.layouts(adapters).items():
        method = next(type(adapters[name].lora) for name in names if name in adapters)
        if not method.more_suffixes:
            continue
        for name in [name for name in names if name not in adapters]:
            if name not in modules:
                raise ValueError(
                    f"{module!r} is written as one module: `names` has no layer for "
                    f"{name!r}."
                )
            values = method.of_plain_layer(kernel_to_tensor(modules[name]))
            tensors |= {name + suffix: value for suffix, value in values.items()}
    return tensors


def trained_beside(modules, adapters):
    """(module, variable) that train with the factors; for heads, all variables."""
    trained = []
    for module, layer in modules.items():
        if isinstance(layer, LowRankAdapter):
            continue
        found = training_state.trained_variables(layer)
        if module not in adapters and {torch_name(layer, v) for v in found} - {"bias"}:
            known = set(map(id, found))
            found += [
                v for v in layers.non_trainable_variables(layer) if id(v) not in known
            ]
        trained += [(module, variable) for variable in found]
    return trained


def fuse_others(others, modules):
    """Joins biases and weights of slices to those of their modules, in place."""
    for module, layout in slices.layouts(modules, modules.places).items():
        names = layout.names
        for weight in {name for part, name in others if part in names}:
            missing = [name for name in names if name not in modules]
            if missing:
                raise ValueError(
                    f"Only part of the {weight} of {module!r} trains: `names` has no "
                    f"layer for {missing}."
                )
            untrained = {
                name: weight_to_tensor(
                    modules[name], variable, name in modules.inputs_first
                )
                for name in names
                for variable in layers.layer_variables(modules[name])
                if torch_name(modules[name], variable) == weight
            }
            parts = {
                name: others.pop((name, weight), untrained[name]) for name in names
            }
            first = parts[names[0]]
            axis = slices.outputs_axis(first, names[0] in modules.inputs_first)
            sizes = sum(part.shape[axis] for part in parts.values())
            if sizes != layout.total(first.shape[axis]):
                raise ValueError(
                    f"The {weight} of {module!r} trains, but the model has only part "
                    "of it."
                )
            value = layout.gather(parts, axis)
            if value.ndim > 1:
                value = layout.order_inputs(value, 1 - axis)
            others[module, weight] = value
