"""Layers that are one module in a file: query, key and value in one c_attn.

The name `module[i/n]` stands for the i-th of n equal slices of a module's outputs.
A fused module has one A for all slices; the layers of the model have one each:

    save    A = [A_0; A_1; ...] of rank R = r_0 + r_1 + ..., B in blocks
    load    A copied to each layer, B sliced

Both are exact. Values for each output, such as DoRA's m, are joined and sliced. The
ranks of the slices are in the file's metadata, so that they can be separated again.

Slices whose outputs are in another order have a Region, which lists them: `regions` is
{name: Region}. `module[0/1]` is a whole module in another order.
"""

import re
from typing import NamedTuple

import numpy as np

from keras_lora.layers import torch_layout

SLICE = re.compile(r"(.+)\[(\d+)/(\d+)\]")


class Share(NamedTuple):
    """The rank of a slice, and the rank of its module."""

    rank: int
    total: int


class Layout(NamedTuple):
    """Which outputs and inputs of a module belong to which slice."""

    names: list  # of the slices
    regions: dict

    def total(self, size):
        """Returns the number of the module's outputs; size: that of one slice."""
        first = self.regions.get(self.names[0])
        return first.total if first else size * len(self.names)

    def fits(self, whole, axis=0):
        size = whole.shape[axis]
        return size == self.total(size // len(self.names))

    def rows(self, name, total):
        """The indices of a slice's outputs among those of its module."""
        if name in self.regions:
            return self.regions[name].rows
        size = total // len(self.names)
        return np.arange(size) + self.names.index(name) * size

    def gather(self, parts, axis=0):
        """Joins {slice: value} to a value of the module, with 0 for missing slices."""
        first = next(iter(parts.values()))
        shape = list(first.shape)
        shape[axis] = total = self.total(first.shape[axis])
        whole = np.zeros(shape, first.dtype)
        outputs = np.moveaxis(whole, axis, 0)
        for name, part in parts.items():
            outputs[self.rows(name, total)] = np.moveaxis(part, axis, 0)
        return whole

    def scatter(self, whole, axis=0):
        """Splits a value of the module into {slice: value}: the inverse of `gather`."""
        total = whole.shape[axis]
        return {name: whole.take(self.rows(name, total), axis) for name in self.names}

    def order_inputs(self, value, axis, inverse=False):
        """Reorders the axis of a module's inputs, to the model's order or back."""
        first = self.regions.get(self.names[0])
        if first is None or first.columns is None:
            return value
        columns = first.columns if inverse else np.argsort(first.columns)
        return value.take(columns, axis)


def layouts(modules, regions=None) -> dict:
    """{module: Layout} for the modules of `module[i/n]` names."""
    counts = {}
    for name in modules:
        match = SLICE.fullmatch(name)
        if not match:
            continue
        module, index, count = match[1], int(match[2]), int(match[3])
        if index >= count or counts.setdefault(module, count) != count:
            raise ValueError(
                f"{name!r} is not a slice of a module of "
                f"{counts.get(module, count)} slices."
            )
    return {
        module: Layout(slices_of(module, count), regions or {})
        for module, count in counts.items()
    }


def slices_of(module, count):
    return [f"{module}[{index}/{count}]" for index in range(count)]


def without_slice(name):
    """Returns the module of a slice; a module's own name is unchanged."""
    match = SLICE.fullmatch(name)
    return match[1] if match else name


def outputs_axis(value, inputs_first):
    """Returns the axis of the outputs in a tensor of the module."""
    return 1 if inputs_first and value.ndim == 2 else 0


def fuse(tensors, settings, regions=None) -> dict:
    """Puts the factors of slices together, in place: {module: ranks of its slices}.

    settings: module or slice -> Settings.
    """
    stacked = {}
    for module, layout in layouts(settings, regions).items():
        adapted = {
            name: settings.pop(name) for name in layout.names if name in settings
        }
        first, *_ = adapted.values()
        a, b = (
            [tensors.pop(name + suffix) for name in adapted]
            for suffix in torch_layout.LINEAR
        )
        if not layout.regions.keys() & adapted and len({len(block) for block in b}) > 1:
            raise ValueError(
                f"The slices of {module!r} have different numbers of outputs."
            )
        for suffix in torch_layout.more_suffixes():
            parts = {name: tensors.pop(name + suffix, None) for name in layout.names}
            if parts[layout.names[0]] is not None:
                tensors[module + suffix] = layout.gather(parts)
        b = [
            block * (own.scaling / first.scaling)
            for block, own in zip(b, adapted.values(), strict=True)
        ]
        shared = all(np.array_equal(a[0], other) for other in a)
        if len(adapted) < len(layout.names) or not shared:
            stacked[module] = [
                adapted[name].rank if name in adapted else 0 for name in layout.names
            ]
            a, b = [np.concatenate(a)], side_by_side(b)
        fused_a = layout.order_inputs(a[0], 1)
        fused_b = layout.gather(dict(zip(adapted, b, strict=True)))
        for suffix, value in zip(torch_layout.LINEAR, (fused_a, fused_b), strict=True):
            tensors[module + suffix] = np.ascontiguousarray(value)
        settings[module] = first.with_rank(len(fused_a))
    return stacked


def side_by_side(blocks):
    """Joins blocks, each with zeros in the columns of the others."""
    total, end = sum(block.shape[1] for block in blocks), 0
    for block in blocks:
        wide = np.zeros((len(block), total, *block.shape[2:]), block.dtype)
        start, end = end, end + block.shape[1]
        wide[:, start:end] = block
        yield wide


def split(tensors, names, stacked, regions=None) -> dict:
    """Cuts the factors of modules into those of slices, in place; inverse of `fuse`.

    Returns {slice: Share} for the slices that are adapted.
    """
    shares = {}
    for module, layout in layouts(names, regions).items():
        keys = [module + suffix for suffix in torch_layout.LINEAR]
        if not all(key in tensors for key in keys):
            continue
        a, b = (tensors.pop(key) for key in keys)
        stack = a.shape[1:-1], b.shape[2:]  # none, or as many matrices in both
        if not layout.fits(b) or b.shape[1:2] != a.shape[:1] or stack[0] != stack[1]:
            raise ValueError(
                f"The factors of {module!r} have shapes {a.shape} and {b.shape}, which "
                f"do not fit {len(layout.names)} slices."
            )
        for suffix in torch_layout.more_suffixes():
            values = tensors.pop(module + suffix, None)
            if values is not None:
                if values.ndim != 1 or len(values) != len(b):
                    raise ValueError(
                        f"{suffix[1:]} of {module!r} has shape {values.shape}; B has "
                        f"{len(b)} outputs."
                    )
                parts = layout.scatter(values)
                tensors |= {name + suffix: part for name, part in parts.items()}
        ranks = stacked.get(module, [len(a)] * len(layout.names))
        if module in stacked and (
            len(ranks) != len(layout.names) or sum(ranks) != len(a)
        ):
            raise ValueError(f"{module!r} has rank {len(a)} and slices of {ranks}.")
        a = layout.order_inputs(a, 1, inverse=True)
        column, remainder = 0, b.copy()
        for name, rank in zip(layout.names, ranks, strict=True):
            rows = layout.rows(name, len(b))
            columns = slice(column, column + rank)
            column += rank if module in stacked else 0
            remainder[rows, columns] = 0
            if rank:
                tensors[name + torch_layout.LINEAR[0]] = a[columns].copy()
                tensors[name + torch_layout.LINEAR[1]] = b[rows, columns].copy()
                shares[name] = Share(rank, len(a))
        if remainder.any():
            raise ValueError(
                f"B of {module!r} is not zero outside the blocks of slices of {ranks}."
            )
    return shares
