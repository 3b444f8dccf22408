"""Names of another framework for the layers of a model."""

import collections
import difflib
from collections.abc import Callable, Mapping

import numpy as np

from keras_lora.files import experts, families, family_names
from keras_lora.keras_internals.layers import layer_state
from keras_lora.layers import kinds, lora_layer
from keras_lora.models import targets
from keras_lora.models.sites import site_paths


class Modules(dict):
    """Module -> layer.

    Attributes:
        sites: Module -> site. One that is no layer by itself stands under the module
            of its layer and the weight's name, "lstm.recurrent_kernel".
        places: {module: Region} for layers that are not a whole module in its order.
        inputs_first: The modules that keep their weights as (in, out).
        parameters: Module -> what PEFT calls it, for those that it adapts as a
            parameter: a router, a stack of experts.
        weights: Path -> module, for sites that are no layers and have a module.
        unnamed: The modules that have no counterpart, if another framework's are
            derived: they are called by their path.
    """

    def __init__(self):
        super().__init__()
        self.sites, self.places = {}, {}
        self.parameters, self.weights = {}, {}
        self.inputs_first, self.unnamed = set(), set()


def name_function(names: Mapping | Callable | None, paths) -> Callable:
    """Path -> module, or None where the path itself is meant."""
    if names is None:
        return lambda path: None
    if callable(names):
        return names
    if not isinstance(names, Mapping):
        raise ValueError(
            "`names` must be a dict from paths here to modules there, a function of "
            f"the path, or a family's name. Received: {names!r}."
        )
    for path in names:
        targets.refuse_two_meanings(path, {path} & paths.keys(), paths, "names")
    unknown = [path for path in names if path not in paths]
    if unknown:
        close = difflib.get_close_matches(str(unknown[0]), paths, n=3)
        hint = f"Close are: {close}." if close else "`keras_lora.summary` shows paths."
        raise ValueError(
            f"`names` has {unknown[0]!r}, which is not the path of a layer. {hint}"
        )
    return names.get


def module_names(paths, names, model=None, adapter=None) -> Modules:
    """Module -> layer.

    model: what `paths` are of. adapter: the file that is read, if one is, whose names
    may be those of an earlier transformers or have another prefix.
    """
    sites = site_paths(paths)
    if isinstance(names, str):
        modules = derived_names(paths, names, model, adapter)
        modules.sites = named_sites(modules, sites, modules.weights.get)
        named = {*modules, *modules.weights.values()}
        modules.unnamed |= modules.sites.keys() - named
        return modules
    get = name_function(names, {**sites, **paths})
    modules = Modules()
    for path, layer in paths.items():
        module = get(path) or path.replace("/", ".")
        if not isinstance(module, str):
            raise ValueError(
                f"`names` gives {module!r} for {path!r}, which is not the name of a "
                "module."
            )
        other = modules.get(module)
        if other is None or not holds_weights(other):
            modules[module] = layer
        elif holds_weights(layer):
            raise ValueError(f"`names` gives two layers the name {module!r}.")
    modules.sites = named_sites(modules, sites, get)
    return modules


def named_sites(modules, sites, get=lambda path: None) -> dict:
    """Module -> site, for the sites of layers that have names.

    Args:
        modules: Module -> layer.
        sites: Path -> site.
        get: The name that a user gives for a path, or None.
    """
    module_of = {id(layer): module for module, layer in modules.items()}
    named = {}
    for path, site in sites.items():
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
    return lora_layer.has_adapters(layer) or any(layer_state(layer))


def derived_names(paths, names, model, adapter) -> Modules:
    """Returns the modules under the names that KerasHub's converters know."""
    found = families.family(model, paths, names)
    if adapter is None:
        named = found.written(since_5=names != families.TRANSFORMERS_4)
        if names == families.TRANSFORMERS_4:  # whose experts are modules, one by one
            named = {path: module for path, module in named.items() if path in paths}
    else:
        named = found.read(adapter.tensors)
    slices = collections.defaultdict(list)
    for path, module in named.items():
        slices[module].append(path)
    modules = Modules()
    for module, parts in slices.items():
        places = {path: found.places[path] for path in parts if path in found.places}
        rows = np.concatenate([[], *(place.rows for place in places.values())])
        if len(rows) > len(np.unique(rows)):
            continue  # one weight in two layers here: none of them has it alone
        parts.sort(key=lambda path: min(places[path].rows) if places else 0)
        is_whole = all(place.is_whole for place in places.values())
        for index, path in enumerate(parts):
            name = module if is_whole else f"{module}[{index}/{len(parts)}]"
            if path in paths:
                modules[name] = paths[path]
            else:
                modules.weights[path] = name
                modules.parameters[module] = experts.parameter_of(module)
            if not is_whole:
                modules.places[name] = places[path]
            if places and places[path].inputs_first:
                modules.inputs_first.add(name)
            if names != families.TRANSFORMERS_4 and family_names.ROUTER.fullmatch(name):
                modules.parameters[name] = experts.parameter_of(name)
    reached = set(map(id, modules.values()))
    for path, layer in paths.items():
        if id(layer) not in reached:
            name = path.replace("/", ".")
            name = f"/{path}" if name in modules else name
            modules[name] = layer
            modules.unnamed.add(name)
    return modules


def refuse_unnamed(modules, adapters):
    """Raises for adapters without a module there: PEFT would ignore them."""
    unnamed = sorted(modules.unnamed & adapters.keys())
    if unnamed:
        raise ValueError(
            f"The layers {unnamed[:5]} have adapters but no module of their own in "
            "transformers. Leave them out with `exclude`, or give `names` as a dict."
        )


def refuse_tied_head(model, names, layers):
    """Raises for a tied embedding, which PEFT adapts differently.

    There it changes where tokens are looked up; the head keeps the base's weights.

    layers: module -> layer, those that an adapter changes.
    """
    heads = targets.output_layers(model) if names is not None else ()
    for module, layer in layers.items():
        if kinds.looks_up(layer) and id(kinds.layer_of(layer)) in heads:
            raise ValueError(
                f"The embedding {module!r} makes the model's outputs too. PEFT changes "
                "it where tokens are looked up and leaves the head as it was, so no "
                "file says the same to both. Leave the embedding out, take the "
                "backbone alone, or leave out `names` for a file of keras_lora's own."
            )
