"""In what two adapters differ."""

import numpy as np

from keras_lora.files.factors import factors_of
from keras_lora.files.factors import low_rank_suffixes
from keras_lora.files.factors import other_suffixes
from keras_lora.files.factors import slots_of
from keras_lora.files.spectrum import singular_values
from keras_lora.models.tables import in_order


def settings_apart(one, two) -> list:
    """[key, first, second] for what the two configurations say otherwise."""
    keys = sorted(one.config.keys() | two.config.keys())
    pairs = [(key, one.config.get(key), two.config.get(key)) for key in keys]
    return [
        [key, *("" if value is None else str(value) for value in values)]
        for key, *values in pairs
        if values[0] != values[1]
    ]


def tensors_apart(one, two) -> list:
    """[module or tensor, ranks, |one - two| over the larger] for what differs."""
    slots = slots_of([one, two])
    files = [factors_of(adapter, slots) for adapter in (one, two)]
    rows = []
    for module in in_order(files[0].factors.keys() | files[1].factors.keys()):
        if found := updates_apart(files, module):
            ranks = [str(file.ranks.get(module, "-")) for file in files]
            rows.append([module, " and ".join(dict.fromkeys(ranks)), found])
    beside = [in_full(file) for file in files]
    for key in in_order(beside[0].keys() | beside[1].keys()):
        if found := arrays_apart(*(tensors.get(key) for tensors in beside)):
            rows.append([key, "", found])
    return rows


def in_full(file):
    """Key -> array for all that is no factor: heads, biases, DoRA's lengths."""
    more = {
        module + suffix: pair[suffix]
        for module, pair in file.factors.items()
        for suffix in other_suffixes(pair)
    }
    return file.others | more


def updates_apart(files, module):
    """The relative difference of two updates in words, None where they are equal."""
    one, two = files
    if module not in one.factors or module not in two.factors:
        return f"only in the {'first' if module in one.factors else 'second'}"
    own, other = (file.factors[module] for file in files)
    if one.scaling(module) == two.scaling(module) and all(
        suffix in other and np.array_equal(own[suffix], other[suffix])
        for suffix in low_rank_suffixes(own)
    ):
        return None
    (b, a), (other_b, other_a) = (file.product(module) for file in files)
    if b.shape[:-1] != other_b.shape[:-1] or a.shape[-1] != other_a.shape[-1]:
        return "other shapes"
    b, other_b = b * one.scaling(module), other_b * two.scaling(module)
    both = np.concatenate([b, -other_b], -1), np.concatenate([a, other_a], -2)
    norms = [
        np.linalg.norm(singular_values(*pair))
        for pair in (both, (b, a), (other_b, other_a))
    ]
    return f"{norms[0] / (max(norms[1:]) or 1):.3g}"


def arrays_apart(one, two):
    if one is None or two is None:
        return f"only in the {'second' if one is None else 'first'}"
    if one.shape != two.shape:
        return "other shapes"
    if np.array_equal(one, two):
        return None
    scale = max(map(np.linalg.norm, (one, two)))
    return f"{np.linalg.norm(one.astype('float64') - two) / scale:.3g}"
