"""What transformers' classes add to the names of their checkpoints.

A converter of KerasHub names tensors of a checkpoint. Adapters name modules: under a
prefix in a task model, and since transformers 5 otherwise for some families.
"""

import collections
import re
from typing import NamedTuple

import numpy as np

from keras_lora.files.converters import Place
from keras_lora.files.converters import placed_layers
from keras_lora.files.experts import as_parameter
from keras_lora.files.family_names import EXPERT_WEIGHTS
from keras_lora.files.family_names import EXPERTS
from keras_lora.files.family_names import HEADS
from keras_lora.files.family_names import ROOTS
from keras_lora.files.family_names import SINCE_5
from keras_lora.keras_internals.keras_hub import converters
from keras_lora.keras_internals.keras_hub import family_of
from keras_lora.keras_internals.keras_hub import is_backbone
from keras_lora.layers.substituted import WeightSite
from keras_lora.models.paths import layer_paths
from keras_lora.models.sites import site_paths

TRANSFORMERS, TRANSFORMERS_4 = "transformers", "transformers4"
BLOCK = re.compile(r"(?:.+/)?(?:transformer_layer|decoder_block)_\d+/")
NUMBERED = re.compile(r"(?:.+\.)?layers\.\d+\.")
ALIASES = {"llama": "llama3"}


class Family(NamedTuple):
    """A model's layers as transformers has them, without a prefix.

    Attributes:
        root: Where transformers' task models keep the backbone.
        is_bare: Whether the model is the backbone itself.
        places: Path -> Place, for layers of the backbone, and for experts' weights.
        heads: Path -> module, for layers beside it.
        renamed: What transformers 5 calls otherwise: expression -> replacement.
    """

    root: str
    is_bare: bool
    places: dict
    heads: dict
    renamed: dict

    def modules(self, since_5=True) -> dict:
        """Path -> module in the backbone."""
        renamed = self.renamed if since_5 else {}
        return {path: rename(p.module, renamed) for path, p in self.places.items()}

    def written(self, since_5=True) -> dict:
        """Path -> module, as in transformers' class for the task."""
        prefix = "" if self.is_bare else f"{self.root}."
        names = {path: prefix + m for path, m in self.modules(since_5).items()}
        return names | self.heads

    def read(self, keys) -> dict:
        """Path -> module, under the names and the prefix that most of a file has."""
        votes, styles = collections.Counter(), [self.modules(x) for x in (True, False)]
        keys = [as_parameter(key) for key in keys]
        for style, known in enumerate(set(style.values()) for style in styles):
            prefixes = (prefix_of(key, known) for key in keys)
            votes.update((style, x) for x in prefixes if x is not None)
        if not votes:
            return self.written()
        (style, prefix), _ = votes.most_common(1)[0]
        outer = prefix.removesuffix(f"{self.root}.")
        names = {path: prefix + module for path, module in styles[style].items()}
        return names | {path: outer + head for path, head in self.heads.items()}


def family(model, paths, names) -> Family:
    """Asks KerasHub's converter for the model's backbone.

    names: its family's, or "transformers".
    """
    layers = [model, *paths.values()]
    backbone = next((layer for layer in layers if is_backbone(layer)), None)
    name, held = None, "a model without a backbone of KerasHub"
    if backbone is not None:
        name, held = family_of(type(backbone)), f"a {type(backbone).__name__}"
    asked = (
        None if names in (TRANSFORMERS, TRANSFORMERS_4) else ALIASES.get(names, names)
    )
    if name is None or asked not in (None, name):
        known = [TRANSFORMERS, TRANSFORMERS_4, *converters()]
        raise ValueError(
            f"`names` {names!r} does not fit {held}{f' of {name!r}' if name else ''}. "
            "Give a dict from paths here to modules there, or a function. A model of "
            f"KerasHub can have one of {known}."
        )
    try:
        placed = placed_layers(backbone, name)
    except Exception as error:  # of a converter, which says what it wants
        raise ValueError(
            f"KerasHub's converter for {name!r} cannot be asked about {held}: "
            f"{type(error).__name__}: {error}. Give `names` as a dict from paths here "
            "to modules there."
        ) from error
    path_of = {id(layer): path for path, layer in paths.items()}
    own = layer_paths(backbone)
    root = ROOTS.get(name, "model")
    places = {
        path_of[id(own[path])]: place.without_prefix(f"{root}.")
        for path, place in placed.items()
        if path in own
    }
    if all(p.module.startswith("language_model.") for p in places.values()):
        places = {  # a language model alone is a class of its own there
            path: p.without_prefix("language_model.") for path, p in places.items()
        }
    places |= expert_places(site_paths(paths), places, EXPERTS.get(name))
    heads = {} if backbone is model else HEADS.get(name, {})
    heads = {path: head for path, head in heads.items() if path in paths}
    return Family(root, backbone is model, places, heads, SINCE_5.get(name, {}))


def expert_places(sites, places, experts) -> dict:
    """Path -> Place, for the weights of banks of experts.

    Args:
        sites: Path -> site.
        places: Path -> Place, for layers beside a bank, which say its number there.
        experts: What the checkpoints call the experts of a layer, or None.
    """
    blocks, weights = {}, collections.defaultdict(list)
    for path, place in places.items():
        block, number = BLOCK.match(path), NUMBERED.match(place.module)
        if block and number:
            blocks[block[0]] = number[0]
    for path, site in sites.items():
        block, weight = BLOCK.match(path), EXPERT_WEIGHTS.get(path.split("/")[-1])
        if experts and isinstance(site, WeightSite) and block and weight:
            weights[f"{blocks[block[0]]}{experts}.{weight}"].append((path, site))
    found = {}
    for module, parts in weights.items():
        size = parts[0][1].kernel_shape[-1]
        for index, (path, _) in enumerate(parts):
            rows = np.arange(size) + index * size
            found[path] = Place(module, rows, total=size * len(parts))
    return found


def rename(module, rules):
    for rule, replacement in rules.items():
        module = re.sub(rule, replacement, module)
    return module


def prefix_of(key, names):
    """What stands before one of the names in a tensor's key; None if none is in it."""
    parts = key.split(".")
    for start in range(len(parts)):
        for end in range(len(parts) - 1, start, -1):
            if ".".join(parts[start:end]) in names:
                return "".join(f"{part}." for part in parts[:start])
    return None
