"""Which modules the settings of a file mean, as PEFT reads them."""

import re
from collections.abc import Mapping
from types import MappingProxyType

from keras_lora.files.patterns import Budget
from keras_lora.files.patterns import Name
from keras_lora.files.patterns import parse
from keras_lora.files.slices import without_slice
from keras_lora.keras_internals.callers import warn_caller

EXACT = re.compile(r"\^((?:\\\W|[^\\^$.|?*+(){}\[\]])+)")


def pattern(values, usual, parameters: Mapping = MappingProxyType({})):
    """Keys that mean one module each: module -> value where it is not the usual one.

    parameters: module -> the parameter that PEFT adapts, and looks for by its name.
    """
    ends = {module: r"(\.weight)?" for module, x in parameters.items() if x != module}
    return {
        f"^{re.escape(module)}{ends.get(module, '')}": value
        for module, value in values.items()
        if value != usual
    }


def value_of(config, pattern_key, default_key, found, warns=True):
    """Module -> rank or alpha: the first key that fits the end of its name.

    warns: Boolean, whether of keys that fit none.
    """
    budget, names, expressions = Budget(), {}, []
    for place, key in enumerate(config[pattern_key]):
        if match := EXACT.fullmatch(key):  # as `pattern` writes them
            name = re.sub(r"\\(\W)", r"\1", match[1])
            names.setdefault(name, (place, key))
        else:
            expressions.append((place, key, parse(key, budget)))
    values, used = {}, set()
    for module in found:
        name = Name(without_slice(module), budget)
        place, first = names.get(name.text, (len(config[pattern_key]), None))
        for other_place, key, expression in expressions:
            if other_place > place:
                break
            if name.is_matched_by(expression, part=True):
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


def ends_of(name) -> list:
    """A name, and what follows each of its dots."""
    return [name[place:] for place in [0, *(x.end() for x in re.finditer(r"\.", name))]]


def check_targets(config, found):
    """`target_modules` and `target_parameters` must mean modules of the tensors."""
    targets, parameters = config["target_modules"], config["target_parameters"]
    modules, budget = [without_slice(module) for module in found], Budget()
    ends = {end for module in modules for end in ends_of(module)}
    if isinstance(targets, str):
        expression = parse(targets, budget)
        names = (Name(module, budget) for module in modules)
        fits = targets == "all-linear" or any(
            n.is_matched_by(expression) for n in names
        )
        targets, unmatched = [targets], [] if fits else [targets]
    else:
        unmatched = [target for target in targets if target not in ends]
    lost = [name for name in parameters if name.removesuffix(".weight") not in ends]
    if len(unmatched) + len(lost) == len(targets) + len(parameters):
        raise ValueError(
            f"target_modules means {[*unmatched, *lost][:5]}, and none of the modules "
            f"that there are tensors for: {modules[:5]}."
        )
    warn_of_unmatched("target_modules", unmatched)
    warn_of_unmatched("target_parameters", lost)


def warn_of_unmatched(key, unmatched):
    if unmatched:
        warn_caller(
            f"{key} has {', '.join(map(repr, unmatched[:5]))}, which means no module "
            "that there are tensors for."
        )
