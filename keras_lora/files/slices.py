"""Layers here that are one module there: query, key and value in one c_attn.

The name `module[i/n]` stands for the i-th of n equal slices of a module's outputs.
A fused module has one A for all slices, the layers here have one each:

    save    A = [A_0; A_1; ...] of rank R = r_0 + r_1 + ..., B in blocks
    load    A copied to each layer, B sliced

Both are exact. A value for each output, DoRA's m, is joined and sliced. What was
stacked comes apart again: the file's metadata says the ranks of the slices.

Slices whose outputs are not that equal part, in that order, have a Place that says
which they are: `places`, {name: Place}. `module[0/1]` is a module in another order.
"""

import re
from typing import NamedTuple

import numpy as np

from keras_lora.layers.method_files import more_suffixes
from keras_lora.layers.settings import alpha_at
from keras_lora.layers.settings import divisor
from keras_lora.layers.torch_layout import LINEAR

SLICE = re.compile(r"(.+)\[(\d+)/(\d+)\]")


class Share(NamedTuple):
    """A slice's rank, and that of its module."""

    rank: int
    total: int


def fused_modules(modules) -> dict:
    """{module: number of slices} for what `module[i/n]` names stand for."""
    counts = {}
    for name in modules:
        match = SLICE.fullmatch(name)
        if not match:
            continue
        module, index, count = match[1], int(match[2]), int(match[3])
        if index >= count or counts.setdefault(module, count) != count:
            raise ValueError(
                f"{name!r} is no slice of a module of {counts.get(module, count)} "
                "slices."
            )
    return counts


def slices_of(module, count):
    return [f"{module}[{index}/{count}]" for index in range(count)]


def outputs_axis(value, inputs_first):
    """Where a tensor of the module has its outputs."""
    return 1 if inputs_first and value.ndim == 2 else 0


def without_slice(name):
    """The module of a slice, or of itself."""
    match = SLICE.fullmatch(name)
    return match[1] if match else name


def rows_of(name, total, places):
    """Which of its module's outputs a slice has."""
    if name in places:
        return places[name].rows
    _, index, count = SLICE.fullmatch(name).groups()
    size = total // int(count)
    return np.arange(size) + int(index) * size


def total_of(names, size, places):
    """How many outputs a module has; size: of one of its slices."""
    return places[names[0]].total if names[0] in places else size * len(names)


def joined(parts, total, places, axis=0):
    """The value of a module from those of its slices: {slice: value}."""
    first = next(iter(parts.values()))
    shape = list(first.shape)
    shape[axis] = total
    whole = np.zeros(shape, first.dtype)
    for name, part in parts.items():
        index = [slice(None)] * whole.ndim
        index[axis] = rows_of(name, total, places)
        whole[tuple(index)] = part
    return whole


def inputs_in_order(value, names, places, axis, inverse=False):
    """A value with a module's inputs on an axis, from the order here or to it."""
    columns = places[names[0]].columns if names[0] in places else None
    if columns is None:
        return value
    return value.take(columns if inverse else np.argsort(columns), axis)


def fuse(tensors, ranks, alphas, use_rslora, places=None) -> dict:
    """Puts the factors of slices together, in place: {module: ranks of its slices}."""
    layout, places = {}, places or {}
    for module, count in fused_modules(ranks).items():
        names = slices_of(module, count)
        own = [name for name in names if name in ranks]
        a, b = ([tensors.pop(name + suffix) for name in own] for suffix in LINEAR)
        size = b[0].shape[0]
        if names[0] not in places and any(block.shape[0] != size for block in b):
            raise ValueError(f"The slices of {module!r} have outputs of several sizes.")
        outputs = total_of(names, size, places)
        for suffix in more_suffixes():
            parts = {name: tensors.pop(name + suffix, None) for name in names}
            if parts[names[0]] is not None:
                tensors[module + suffix] = joined(parts, outputs, places)
        scaling = [alphas[name] / divisor(ranks[name], use_rslora) for name in own]
        b = [block * (s / scaling[0]) for block, s in zip(b, scaling, strict=True)]
        shared = len(own) == count and all(np.array_equal(a[0], other) for other in a)
        if shared:
            fused_a = a[0]
            fused_b = joined(dict(zip(own, b, strict=True)), outputs, places)
        else:
            layout[module] = [ranks.get(name, 0) for name in names]
            fused_a = np.concatenate(a)
            fused_b = np.zeros((outputs, len(fused_a), *b[0].shape[2:]), b[0].dtype)
            column = 0
            for name, block in zip(own, b, strict=True):
                columns = slice(column, column + ranks[name])
                fused_b[rows_of(name, outputs, places), columns] = block
                column = columns.stop
        fused_a = inputs_in_order(fused_a, names, places, 1)
        for suffix, value in zip(LINEAR, (fused_a, fused_b), strict=True):
            tensors[module + suffix] = np.ascontiguousarray(value)
        total = len(fused_a)
        alpha = alpha_at(total, alphas[own[0]], ranks[own[0]], use_rslora)
        for name in own:
            del ranks[name], alphas[name]
        ranks[module], alphas[module] = total, alpha
    return layout


def split(tensors, modules, layout) -> dict:
    """The inverse, in place: {slice: Share} for the slices that are adapted."""
    shares, places = {}, getattr(modules, "places", {})
    for module, count in fused_modules(getattr(modules, "sites", modules)).items():
        names = slices_of(module, count)
        keys = [module + suffix for suffix in LINEAR]
        if not all(key in tensors for key in keys):
            continue
        a, b = (tensors.pop(key) for key in keys)
        outputs = total_of(names, len(b) // count, places)
        stack = a.shape[1:-1], b.shape[2:]  # none, or as many matrices in both
        if len(b) != outputs or b.shape[1:2] != a.shape[:1] or stack[0] != stack[1]:
            raise ValueError(
                f"The factors of {module!r} have shapes {a.shape} and {b.shape}, which "
                f"do not fit {count} slices."
            )
        for suffix in more_suffixes():
            values = tensors.pop(module + suffix, None)
            if values is not None:
                if values.ndim != 1 or len(values) != len(b):
                    raise ValueError(
                        f"{suffix[1:]} of {module!r} has shape {values.shape}; B has "
                        f"{len(b)} outputs."
                    )
                tensors |= {
                    name + suffix: values[rows_of(name, outputs, places)]
                    for name in names
                }
        ranks = layout.get(module, [len(a)] * count)
        stacked = module in layout
        if stacked and (len(ranks) != count or sum(ranks) != len(a)):
            raise ValueError(f"{module!r} has rank {len(a)} and slices of {ranks}.")
        a = inputs_in_order(a, names, places, 1, inverse=True)
        column, rest = 0, b.copy()
        for name, rank in zip(names, ranks, strict=True):
            rows = rows_of(name, outputs, places)
            columns = slice(column, column + rank)
            column += rank if stacked else 0
            rest[rows, columns] = 0
            if rank:
                tensors[name + LINEAR[0]] = a[columns].copy()
                tensors[name + LINEAR[1]] = b[rows, columns].copy()
                shares[name] = Share(rank, len(a))
        if rest.any():
            raise ValueError(
                f"B of {module!r} is not zero outside the blocks of slices of {ranks}."
            )
    return shares
