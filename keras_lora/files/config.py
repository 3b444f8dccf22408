"""adapter_config.json: settings under PEFT's names, and the modules they apply to."""

import collections
import re
import weakref

from keras_lora.files import slices
from keras_lora.files.patterns import Budget, Pattern
from keras_lora.keras_internals import warn_caller
from keras_lora.layers import torch_layout
from keras_lora.layers.settings import Settings

CONFIG = "adapter_config.json"
# Settings that decide how the tensors are read; the tensors' metadata has them too.
SETTINGS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")


def reading_settings(config) -> dict:
    """Returns the settings without which the tensors cannot be interpreted."""
    methods = [word for word in torch_layout.METHODS if word and config.get(word)]
    return {key: config.get(key) for key in (*SETTINGS, *methods)}


# Facts about the base model, which are kept when a loaded adapter is saved again.
FACTS = ("task_type", "base_model_name_or_path")
_loaded_facts = weakref.WeakKeyDictionary()  # model -> facts in the file it loaded


def remember_facts(model, config):
    _loaded_facts[model] = {key: config.get(key) for key in FACTS}


def model_facts(model, facts):
    """Returns the facts about the base model: those given, else those loaded."""
    for key, value in facts.items():
        if not isinstance(value, (str, type(None))):
            raise ValueError(f"`{key}` must be a name. Received: {key}={value!r}.")
    loaded = _loaded_facts.get(model, dict.fromkeys(FACTS))
    return {key: facts[key] or loaded[key] for key in FACTS}


def make_config(settings, parameters=None, **options):
    """The configuration of an adapter.

    Args:
        settings: module -> Settings, all of the same `use_rslora`.
        parameters: module -> name of the parameter that PEFT adapts there.
        options: Further settings under PEFT's names.
    """
    parameters = parameters or {}
    # PEFT obeys a pattern for a parameter, but warns about it.
    decisive = [settings[module] for module in parameters] or [*settings.values()]
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        # Not None, for which PEFT would choose modules itself.
        "target_modules": sorted(settings.keys() - parameters.keys()),
        "r": most_common([own.rank for own in decisive]),
        "lora_alpha": most_common([own.alpha for own in decisive]),
    }
    optional = {
        "target_parameters": sorted(parameters.values()),
        "rank_pattern": pattern(settings, "rank", config["r"], parameters),
        "alpha_pattern": pattern(settings, "alpha", config["lora_alpha"], parameters),
        "use_rslora": any(own.use_rslora for own in settings.values()),
        **options,
    }
    return config | {key: value for key, value in optional.items() if value}


def most_common(values):
    """The most frequent value; PEFT's default, 8, if there is none."""
    return collections.Counter(values or [8]).most_common(1)[0][0]


EXACT = re.compile(r"\^((?:\\\W|[^\\^$.|?*+(){}\[\]])+)")


def pattern(settings, attribute, usual, parameters=None):
    """One key for each module whose rank or alpha differs from the usual one.

    Args:
        settings: module -> Settings.
        attribute: "rank" or "alpha".
        usual: The value without a key.
        parameters: module -> name of the parameter that PEFT adapts there.
    """
    in_peft = (parameters or {}).items()
    ends = {module: r"(\.weight)?" for module, name in in_peft if name != module}
    return {
        f"^{re.escape(module)}{ends.get(module, '')}": getattr(own, attribute)
        for module, own in settings.items()
        if getattr(own, attribute) != usual
    }


def values_by_module(config, pattern_key, default_key, modules, warns=True):
    """Module -> rank or alpha, by the first key that matches the end of its name.

    warns: Boolean, whether to warn about keys that match no module.
    """
    budget, names, expressions = Budget(), {}, []
    for index, key in enumerate(config[pattern_key]):
        if match := EXACT.fullmatch(key):  # as `pattern` writes them
            name = re.sub(r"\\(\W)", r"\1", match[1])
            names.setdefault(name, (index, key))
        else:
            expressions.append((index, key, Pattern(key, budget)))
    values, used = {}, set()
    for module in modules:
        name = slices.without_slice(module)
        index, first = names.get(name, (len(config[pattern_key]), None))
        for other_index, key, expression in expressions:
            if other_index > index:
                break
            if expression.matches(name, part=True):
                first = key
                break
        used.add(first)
        values[module] = config[default_key if first is None else pattern_key]
        if first is not None:
            values[module] = values[module][first]
    if warns:
        unmatched = [key for key in config[pattern_key] if key not in used]
        warn_of_unmatched(pattern_key, unmatched)
    return values


def settings_by_module(config, modules) -> dict:
    """Module -> Settings; config: checked."""
    ranks = values_by_module(config, "rank_pattern", "r", modules)
    alphas = values_by_module(config, "alpha_pattern", "lora_alpha", modules)
    return {
        module: Settings(ranks[module], alphas[module], config["use_rslora"])
        for module in modules
    }


def ends_of(name) -> list:
    """Returns a name, and the part after each of its dots."""
    return [name[index:] for index in [0, *(x.end() for x in re.finditer(r"\.", name))]]


def refuse_unmatched_targets(config, modules_with_tensors):
    """Raises unless `target_modules` or `target_parameters` match the tensors."""
    targets, parameters = config["target_modules"], config["target_parameters"]
    modules = [slices.without_slice(module) for module in modules_with_tensors]
    ends = {end for module in modules for end in ends_of(module)}
    if isinstance(targets, str):
        expression = Pattern(targets, Budget())
        fits = targets == "all-linear" or any(map(expression.matches, modules))
        targets, unmatched = [targets], [] if fits else [targets]
    else:
        unmatched = [target for target in targets if target not in ends]
    lost = [name for name in parameters if name.removesuffix(".weight") not in ends]
    if len(unmatched) + len(lost) == len(targets) + len(parameters):
        raise ValueError(
            f"target_modules has {[*unmatched, *lost][:5]}, which match none of the "
            f"modules that have tensors: {modules[:5]}."
        )
    warn_of_unmatched("target_modules", unmatched)
    warn_of_unmatched("target_parameters", lost)


def warn_of_unmatched(key, unmatched):
    if unmatched:
        warn_caller(
            f"{key} has {', '.join(map(repr, unmatched[:5]))}, but the file has no "
            "tensors for such a module."
        )
