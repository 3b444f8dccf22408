"""adapter_config.json: the settings of an adapter, in PEFT's words."""

import collections
import weakref

from keras_lora.files.targeting import pattern
from keras_lora.layers.method_files import METHODS
from keras_lora.layers.settings import checked_alpha

CONFIG = "adapter_config.json"
# What decides how the tensors are read: it also stands in the tensors' metadata.
SETTINGS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")


def stated(config) -> dict:
    """The settings that the tensors mean nothing without, another method's too."""
    methods = [word for word in METHODS if word and config.get(word)]
    return {key: config.get(key) for key in (*SETTINGS, *methods)}


# What a file says about itself, and a file of the same adapter says again.
KEPT = ("task_type", "base_model_name_or_path")
_said_of = weakref.WeakKeyDictionary()  # model -> the same of the file it has loaded


def remember_file(model, config):
    _said_of[model] = {key: config.get(key) for key in KEPT}


def said_of(model, given):
    """What a file of the model says about itself: as given, else as it was loaded."""
    for key, value in given.items():
        if not isinstance(value, (str, type(None))):
            raise ValueError(f"`{key}` must be a name. Received: {key}={value!r}.")
    loaded = _said_of.get(model, dict.fromkeys(KEPT))
    return {key: given[key] or loaded[key] for key in KEPT}


def settings(ranks, alphas, use_rslora, parameters=None, **others):
    """The configuration of an adapter with these ranks and alphas per module.

    parameters: module -> what PEFT adapts as a parameter, which it calls so.
    """
    parameters = parameters or {}
    alphas = {module: checked_alpha(alpha) for module, alpha in alphas.items()}
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        # An empty list: for None PEFT has modules of its own choice.
        "target_modules": sorted(ranks.keys() - parameters.keys()),
        # PEFT warns of a pattern that means a parameter, though it obeys it.
        "r": most_common([ranks[m] for m in parameters] or ranks.values()),
        "lora_alpha": most_common([alphas[m] for m in parameters] or alphas.values()),
    }
    optional = {
        "target_parameters": sorted(parameters.values()),
        "rank_pattern": pattern(ranks, config["r"], parameters),
        "alpha_pattern": pattern(alphas, config["lora_alpha"], parameters),
        "use_rslora": use_rslora,
        **others,
    }
    return config | {key: value for key, value in optional.items() if value}


def most_common(values):
    """PEFT's default where there is none: rows of a table have no rank."""
    return collections.Counter(values or [8]).most_common(1)[0][0]
