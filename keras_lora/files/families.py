"""Names of transformers' modules, from KerasHub's converters of checkpoints.

A converter of KerasHub names tensors of a checkpoint. Adapters name modules, which have
a prefix in a task model, and for some families other names since transformers 5.
"""

import collections
import itertools
import re
from typing import NamedTuple

import numpy as np

from keras_lora.files import family_names, tensors
from keras_lora.files.experts import stack_key
from keras_lora.keras_internals import keras_hub
from keras_lora.keras_internals.layer_state import own_variables
from keras_lora.layers import kinds
from keras_lora.layers.lora_layer import LoRALayer
from keras_lora.layers.substituted import WeightSite
from keras_lora.models import presets, sites

TRANSFORMERS, TRANSFORMERS_4 = "transformers", "transformers4"
BLOCK = re.compile(r"(?:.+/)?(?:transformer_layer|decoder_block)_\d+/")
NUMBERED = re.compile(r"(?:.+\.)?layers\.\d+\.")
ALIASES = {"llama": "llama3"}


class Family(NamedTuple):
    """A model's layers as transformers has them, without a prefix.

    Attributes:
        root: Where transformers' task models keep the backbone.
        is_bare: Whether the model is the backbone itself.
        regions: Path -> Region, for layers of the backbone, and for experts' weights.
        heads: Path -> module, for layers beside it.
        renamed: What transformers 5 has renamed: expression -> replacement.
    """

    root: str
    is_bare: bool
    regions: dict
    heads: dict
    renamed: dict

    def modules(self, since_5) -> dict:
        """Path -> module in the backbone."""
        renamed = self.renamed if since_5 else {}
        return {path: rename(p.module, renamed) for path, p in self.regions.items()}

    def written(self, since_5=True) -> dict:
        """Path -> module, as in transformers' class for the task."""
        prefix = "" if self.is_bare else f"{self.root}."
        names = {path: prefix + m for path, m in self.modules(since_5).items()}
        return names | self.heads

    def read(self, keys) -> dict:
        """Path -> module, with the names and the prefix of most keys of a file."""
        votes, styles = collections.Counter(), [self.modules(x) for x in (True, False)]
        keys = [stack_key(key) for key in keys]
        for style, known in enumerate(set(style.values()) for style in styles):
            prefixes = (prefix_of(key, known) for key in keys)
            votes.update((style, x) for x in prefixes if x is not None)
        if not votes:
            return self.written()
        (style, prefix), _ = votes.most_common(1)[0]
        outer = prefix.removesuffix(f"{self.root}.")
        names = {path: prefix + module for path, module in styles[style].items()}
        return names | {path: outer + head for path, head in self.heads.items()}


def family(paths, names) -> Family:
    """Asks KerasHub's converter for the model's backbone.

    Args:
        paths: The `Paths` of a model.
        names: The name of its family, or "transformers".
    """
    layers = [paths.model, *paths.layers.values()]
    backbone = next((layer for layer in layers if keras_hub.is_backbone(layer)), None)
    name, described = None, "a model without a backbone of KerasHub"
    if backbone is not None:
        name, described = (
            keras_hub.family_of(type(backbone)),
            f"a {type(backbone).__name__}",
        )
    asked = (
        None if names in (TRANSFORMERS, TRANSFORMERS_4) else ALIASES.get(names, names)
    )
    if name is None or asked not in (None, name):
        known = [TRANSFORMERS, TRANSFORMERS_4, *keras_hub.converters()]
        raise ValueError(
            f"`names` {names!r} does not fit {described}"
            f"{f' of {name!r}' if name else ''}. Give a dict from the model's paths to "
            "module names, or a function. For a model of KerasHub, `names` can be one "
            f"of {known}."
        )
    try:
        backbone_regions = regions_of(backbone, name)
    except Exception as error:  # a converter may raise anything
        raise ValueError(
            f"KerasHub's converter for {name!r} does not work for {described}: "
            f"{type(error).__name__}: {error}. Give `names` as a dict from the model's "
            "paths to module names."
        ) from error
    backbone_layers = sites.layers_by_path(backbone)
    root = family_names.ROOTS.get(name, "model")
    regions = {
        paths.path_of[id(backbone_layers[path])]: region.without_prefix(f"{root}.")
        for path, region in backbone_regions.items()
        if path in backbone_layers
    }
    if all(p.module.startswith("language_model.") for p in regions.values()):
        regions = {  # a language model alone is a class of its own there
            path: p.without_prefix("language_model.") for path, p in regions.items()
        }
    regions |= expert_regions(paths.sites, regions, family_names.EXPERTS.get(name))
    alone = backbone is paths.model
    heads = {} if alone else family_names.HEADS.get(name, {})
    heads = {path: head for path, head in heads.items() if path in paths.layers}
    return Family(root, alone, regions, heads, family_names.SINCE_5.get(name, {}))


def expert_regions(sites, regions, experts) -> dict:
    """Path -> Region, for the weights of layers of experts.

    Args:
        sites: Path -> site.
        regions: Path -> Region, for the layers beside the experts, which number them.
        experts: What the checkpoints call the experts of a layer, or None.
    """
    blocks, weights = {}, collections.defaultdict(list)
    for path, region in regions.items():
        block, number = BLOCK.match(path), NUMBERED.match(region.module)
        if block and number:
            blocks[block[0]] = number[0]
    for path, site in sites.items():
        block = BLOCK.match(path)
        weight = family_names.EXPERT_WEIGHTS.get(path.split("/")[-1])
        if experts and isinstance(site, WeightSite) and block and weight:
            weights[f"{blocks[block[0]]}{experts}.{weight}"].append((path, site))
    of_experts = {}
    for module, parts in weights.items():
        size = parts[0][1].kernel_shape[-1]
        for index, (path, _) in enumerate(parts):
            rows = np.arange(size) + index * size
            of_experts[path] = Region(module, rows, total=size * len(parts))
    return of_experts


def rename(module, rules):
    for rule, replacement in rules.items():
        module = re.sub(rule, replacement, module)
    return module


def prefix_of(key, names):
    """The part of a tensor's key before one of the names; None if it has none."""
    parts = key.split(".")
    for start in range(len(parts)):
        for end in range(len(parts) - 1, start, -1):
            if ".".join(parts[start:end]) in names:
                return "".join(f"{part}." for part in parts[:start])
    return None


class Indices(np.ndarray):
    """Given to converters instead of a tensor; exact even where they round it."""

    def astype(self, dtype, **kwargs):
        return self


class Region(NamedTuple):
    """The rows and columns of a module of transformers that are a layer's."""

    module: str
    rows: np.ndarray
    columns: np.ndarray | None = None  # the inputs; None if the order is the same
    total: int = 0  # outputs of the module
    inputs_first: bool = False  # the module keeps its weight as (in, out)

    def without_prefix(self, prefix):
        return Region(self.module.removeprefix(prefix), *self[1:])

    @property
    def is_whole(self):
        """Whether the layer is the module, in the same order."""
        return self.columns is None and np.array_equal(self.rows, np.arange(self.total))


def regions_of(backbone, family) -> dict:
    """Path in the backbone -> Region, for the layers that are modules there."""
    # Where the backbone is quantized or adapted, the kernels that the converter means
    # are not there.
    cls = type(backbone)
    cls = presets.plain_class_of(cls) if hasattr(cls, "carried_class") else cls
    config = presets.plain_float_config(cls.get_config(backbone))
    copy = keras_hub.uninitialized_copy(cls, {**config, "dtype": "float32"})
    owners, sizes = {}, collections.Counter()
    layers_by_path = sites.layers_by_path(copy)
    for path, layer in layers_by_path.items():
        owners |= {id(variable): path for variable in own_variables(layer)}
    by_word = collections.defaultdict(dict)

    def count(variable, key, hook):
        sizes[key] += np.prod(variable.shape, dtype=int)

    def add_region(variable, key, hook):
        path = owners.get(id(variable))
        module, _, word = key.rpartition(".")
        if (
            path is not None
            and tensors.torch_name(layers_by_path[path], variable) == word
        ):
            region = region_of(layers_by_path[path], variable, hook, sizes[key])
            by_word[path][word] = region and Region(module, *region[1:])

    try:
        keras_hub.run_converter(family, copy, count)
    except Exception:  # of a converter that takes images for granted, say
        if not keras_hub.add_absent_parts(copy):
            raise
        sizes.clear()
        keras_hub.run_converter(family, copy, count)
    keras_hub.run_converter(family, copy, add_region)
    regions = {}
    for path in layers_by_path:
        values = list(by_word[path].values())
        if values and share_region(values):
            regions[path] = by_word[path].get("weight", values[0])
    return regions


def share_region(regions):
    """Whether all variables of a layer have the same rows of one module."""
    first = regions[0]
    return first is not None and all(
        other is not None
        and other.module == first.module
        and np.array_equal(other.rows, first.rows)
        for other in regions
    )


def region_of(layer, variable, hook, size):
    """Returns a variable's Region; None if a converter does more than cut and permute.

    size: of the tensor there, of which several variables may be parts.
    """
    kind, shape = kinds.kind_of(layer), tuple(variable.shape)
    if kind is LoRALayer or tensors.torch_name(layer, variable) != "weight":
        return vector_region(shape, hook, size)
    form = kinds.form_of(layer, 1)
    if form.batch_axes:
        return None
    matrix = form.as_matrix(np.broadcast_to(np.int32(0), shape))
    probes = [form.from_matrix(x, shape) for x in indices(*matrix.shape)]
    if form.looks_up or kind.weight_to_file(layer, probes[0]).ndim != 2:
        ends = (convert(kind.weight_to_file(layer, x), hook, shape) for x in probes)
        if all(map(np.array_equal, ends, probes)):
            return Region("", np.arange(matrix.shape[1]), total=matrix.shape[1])
        return None
    inputs = len(matrix)
    for total, inputs_first in itertools.product(
        dict.fromkeys((size // inputs, matrix.shape[1])), (False, True)
    ):
        sources = indices(total, inputs)
        if inputs_first:
            sources = [source.T for source in sources]
        ends = [convert(source, hook, shape) for source in sources]
        if any(end is None for end in ends):
            continue
        rows, columns = map(form.as_matrix, ends)
        if is_constant(rows, 0) and is_constant(columns, 1):
            rows, columns = rows[0], columns[:, 0]
            if not (
                are_distinct_indices(rows, total)
                and are_distinct_indices(columns, inputs)
            ):
                return None
            in_order = np.array_equal(columns, np.arange(inputs))
            return Region("", rows, None if in_order else columns, total, inputs_first)
    return None


def indices(*shape):
    """The index of each row and that of each column, as matrices that hold no more."""
    rows, columns = (np.arange(size, dtype="int32") for size in shape)
    return [np.broadcast_to(x, shape) for x in (rows[:, None], columns)]


def vector_region(shape, hook, size):
    """Returns the `Region` of a bias, a norm or a table of positions."""
    length = np.prod(shape, dtype=int)
    sources = [np.arange(size)]
    if size == length:
        sources.append(sources[0].reshape(shape))
    for source in sources:
        rows = convert(source, hook, shape)
        if rows is not None and are_distinct_indices(rows, size):
            return Region("", rows.reshape(-1), total=int(size))
    return None


def are_distinct_indices(rows, size):
    """Whether rows are distinct indices below `size`: they were only permuted."""
    ordered = np.unique(rows)
    return len(ordered) == rows.size and ordered[0] >= 0 and ordered[-1] < size


def convert(source, hook, shape):
    """Returns a tensor as the converter transforms it; None if it does not fit."""
    try:
        value = source.view(Indices)
        value = value if hook is None else hook(value, list(shape))
    except (ValueError, IndexError, TypeError):
        return None
    fits = getattr(value, "shape", None) == shape and value.dtype == source.dtype
    return np.asarray(value) if fits else None


def is_constant(matrix, axis):
    """Along an axis; an axis that numpy repeats is not read."""
    return matrix.strides[axis] == 0 or bool((matrix == matrix.take([0], axis)).all())
