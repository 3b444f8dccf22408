"""Maps the layers of a model to module names of another framework."""

import collections
from collections.abc import Callable, Mapping

import numpy as np

from keras_lora.files import experts, families, family_names
from keras_lora.keras_internals.layer_state import layer_variables
from keras_lora.layers import arguments, kinds, lora_layer
from keras_lora.models import targets


class Modules(dict):
    """Module -> layer.

    Attributes:
        sites: Module -> site. A site that is one of several in a layer is listed under
            the layer's module and the weight's name, "lstm.recurrent_kernel".
        regions: {module: Region} for layers that are part of a module, or reordered.
        inputs_first: The modules that keep their weights as (in, out).
        parameters: Module -> name in PEFT, for those that it adapts as parameters:
            routers and stacks of experts.
        weights: Path -> module, for sites that are not layers but have a module.
        unnamed: Modules without a counterpart, which are named by their path.
    """

    def __init__(self):
        super().__init__()
        self.sites, self.regions = {}, {}
        self.parameters, self.weights = {}, {}
        self.inputs_first, self.unnamed = set(), set()


def name_function(names: Mapping | Callable | None, layers_and_sites) -> Callable:
    """Returns a function from paths to modules, None where the path is the name."""
    if names is None:
        return lambda path: None
    if callable(names):
        return names
    if not isinstance(names, Mapping):
        raise ValueError(
            "`names` must be a dict from the model's paths to module names, a function "
            f"of the path, or a family's name. Received: {names!r}."
        )
    for path in names:
        targets.refuse_two_meanings(
            path, {path} & layers_and_sites.keys(), layers_and_sites, "names"
        )
    unknown = [path for path in names if path not in layers_and_sites]
    if unknown:
        hint = arguments.closest(unknown[0], layers_and_sites)
        raise ValueError(
            f"`names` has {unknown[0]!r}, which is not the path of a layer."
            f"{hint or ' `keras_lora.summary` shows paths.'}"
        )
    return names.get


def modules_of(paths, names, adapter=None) -> Modules:
    """Module -> layer.

    Args:
        paths: The `Paths` of a model.
        names: As in `save_adapter`.
        adapter: The adapter that is read, if any; its names may be from an earlier
            transformers or have another prefix.
    """
    if isinstance(names, str):
        modules = names_from_converters(paths, names, adapter)
        modules.sites = sites_by_module(modules, paths.sites, modules.weights.get)
        named = {*modules, *modules.weights.values()}
        modules.unnamed |= modules.sites.keys() - named
        return modules
    get = name_function(names, {**paths.sites, **paths.layers})
    modules = Modules()
    for path, layer in paths.layers.items():
        module = get(path) or path.replace("/", ".")
        if not isinstance(module, str):
            raise ValueError(
                f"`names` gives {module!r} for {path!r}, which is not a module name."
            )
        other = modules.get(module)
        if other is None or not holds_weights(other):
            modules[module] = layer
        elif holds_weights(layer):
            raise ValueError(f"`names` gives two layers the name {module!r}.")
    modules.sites = sites_by_module(modules, paths.sites, get)
    return modules


def sites_by_module(modules, sites_by_path, get) -> dict:
    """Module -> site, for the sites of layers that have names.

    Args:
        modules: Module -> layer.
        sites_by_path: Those of a model.
        get: Function from a path to the user's name for it, or None.
    """
    module_of = {id(layer): module for module, layer in modules.items()}
    named = {}
    for path, site in sites_by_path.items():
        layer = kinds.layer_of(site)
        module = module_of.get(id(layer))
        if module is None:
            continue
        if site is not layer:
            weight = site.weight_name.replace("/", ".")
            module = get(path) or f"{module}.{weight}"
        named[module] = site
    return named


def holds_weights(layer):
    """Whether a layer has weights itself: an InputLayer or a container has none."""
    return lora_layer.has_adapters(layer) or bool(layer_variables(layer))


def names_from_converters(paths, names, adapter) -> Modules:
    """Returns the modules under the names from KerasHub's converters."""
    family = families.family(paths, names)
    if adapter is None:
        named = family.written(since_5=names != families.TRANSFORMERS_4)
        if names == families.TRANSFORMERS_4:  # where each expert has its own modules
            named = {
                path: module for path, module in named.items() if path in paths.layers
            }
    else:
        named = family.read(adapter.tensors)
    parts_of_module = collections.defaultdict(list)
    for path, module in named.items():
        parts_of_module[module].append(path)
    modules = Modules()
    for module, parts in parts_of_module.items():
        regions = {
            path: family.regions[path] for path in parts if path in family.regions
        }
        rows = np.concatenate([[], *(region.rows for region in regions.values())])
        if len(rows) > len(np.unique(rows)):
            continue  # two layers share the weight
        parts.sort(key=lambda path: min(regions[path].rows) if regions else 0)
        is_whole = all(region.is_whole for region in regions.values())
        for index, path in enumerate(parts):
            name = module if is_whole else f"{module}[{index}/{len(parts)}]"
            if path in paths.layers:
                modules[name] = paths.layers[path]
            else:
                modules.weights[path] = name
                modules.parameters[module] = experts.parameter_of(module)
            if not is_whole:
                modules.regions[name] = regions[path]
            if regions and regions[path].inputs_first:
                modules.inputs_first.add(name)
            if names != families.TRANSFORMERS_4 and family_names.ROUTER.fullmatch(name):
                modules.parameters[name] = experts.parameter_of(name)
    reached = set(map(id, modules.values()))
    for path, layer in paths.layers.items():
        if id(layer) not in reached:
            name = path.replace("/", ".")
            name = f"/{path}" if name in modules else name
            modules[name] = layer
            modules.unnamed.add(name)
    return modules


def refuse_unnamed(modules, adapters):
    """Raises for adapters without a counterpart, which PEFT would ignore."""
    unnamed = sorted(modules.unnamed & adapters.keys())
    if unnamed:
        raise ValueError(
            f"The layers {unnamed[:5]} have adapters but no counterpart in "
            "transformers. Leave them out with `exclude`, or give `names` as a dict."
        )


def refuse_tied_head(model, names, layers):
    """Raises for a tied embedding, which PEFT adapts only where tokens are looked up.

    layers: module -> layer, those that an adapter changes.
    """
    output_ids = targets.output_layers(model) if names is not None else ()
    for module, layer in layers.items():
        if kinds.looks_up(layer) and id(kinds.layer_of(layer)) in output_ids:
            raise ValueError(
                f"The embedding {module!r} makes the model's outputs too. PEFT would "
                "change it only where tokens are looked up, not in the head, so the "
                "file would mean another adapter there. Leave the embedding out, save "
                "only the backbone, or leave out `names` for a file that only "
                "keras_lora reads."
            )


# Parts of PEFT's keys that are not module names.
PARTS = ["lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "base_layer"]
PARTS += ["lora_magnitude_vector", "modules_to_save", "original_module"]


def refuse_ambiguous_names(adapted, weights):
    """Raises ValueError for modules whose keys would be read as another module's.

    Args:
        adapted: The modules that have factors.
        weights: (module, name) of the variables that trained with them.
    """
    whole = {module for module, _ in weights} - adapted.keys()
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
