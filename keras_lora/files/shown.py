"""An adapter as a table."""

import math
import warnings

from keras_lora.files.factors import factors_of
from keras_lora.files.factors import low_rank_suffixes
from keras_lora.files.factors import other_suffixes
from keras_lora.files.factors import slots_of
from keras_lora.models.tables import counted
from keras_lora.models.tables import in_bytes
from keras_lora.models.tables import in_order


def quiet_factors(adapter):
    """`factors_of` without its warnings, which came when the adapter was read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return factors_of(adapter, slots_of([adapter]))


def parts_of(adapter, most=math.inf):
    """Title, head, rows and lines below, as a `Table` has them.

    most: how many rows there are.
    """
    try:
        file = quiet_factors(adapter)
    except ValueError as error:  # printing something is no place for errors
        return "Adapter", ["module"], [], [f"It cannot be loaded: {error}"]
    head = ["module", "A, B", "rank", "alpha", "parameters", "size"]
    head += ["error"] if adapter.errors else []
    rows = []
    for module in in_order(file.factors)[: min(most, len(file.factors))]:
        pair = file.factors[module]
        row = [
            module,
            " ".join(
                str(pair[suffix].shape)
                for suffix in (*low_rank_suffixes(pair), *other_suffixes(pair))
            ),
            f"{file.ranks[module]}",
            f"{file.alphas[module]:g}",
            f"{sum(value.size for value in pair.values()):,}",
            size(pair.values()),
        ]
        if adapter.errors:
            row.append(f"{adapter.errors.get(module, 0):.2g}")
        rows.append(row)
    more = len(file.factors) - len(rows)
    lines = [f"and {counted(more, 'module')} more"] if more else []
    return "Adapter", head, rows, [*lines, *totals(adapter, file)]


def totals(adapter, file):
    """What stands below the rows."""
    method = ", ".join(["LoRA", *file.method])
    lines = [f"{method}: {in_words(adapter)}"]
    if file.others:
        sizes = sum(value.size for value in file.others.values())
        names = ", ".join(in_order(file.others))
        lines.append(f"In full, {counted(sizes, 'parameter')}: {names}")
    return lines


def in_words(adapter):
    """1 module, rank 8, alpha 16, 1,234 parameters, 4.9 kB."""
    try:
        file = quiet_factors(adapter)
    except ValueError:
        return f"{counted(len(adapter.tensors), 'tensor')}, which cannot be loaded"
    parameters = sum(value.size for value in adapter.tensors.values())
    errors = adapter.errors.values()
    return ", ".join(
        [
            counted(len(file.factors), "module"),
            f"rank {reach(file.ranks)}",
            f"alpha {reach(file.alphas)}",
            counted(parameters, "parameter"),
            size(adapter.tensors.values()),
            *([f"errors up to {max(errors):.2g}"] if errors else []),
        ]
    )


def reach(values):
    low, high = (f"{bound(values.values()):g}" for bound in (min, max))
    return low if low == high else f"{low} to {high}"


def size(arrays):
    return in_bytes(sum(value.nbytes for value in arrays))
