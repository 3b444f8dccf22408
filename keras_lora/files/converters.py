"""Which module of transformers a layer of KerasHub is, as its converter says.

A converter turns a tensor of transformers into a variable by a function: transposed,
reshaped, cut out of a fused projection, rows of rotary halves in another order. Here
the function gets the indices of rows and of columns in place of the tensor, and
where they end up is read off.

    source   (total, inputs)    module there: a linear layer's weight
    kernel   (inputs, outputs)  layer here, as a matrix
    rows     (outputs,)         which output there each output here is
    columns  (inputs,)          likewise
"""

import collections
import itertools
from typing import NamedTuple

import numpy as np

from keras_lora.files.tensors import torch_name
from keras_lora.keras_internals.keras_hub import add_absent_parts
from keras_lora.keras_internals.keras_hub import ask
from keras_lora.keras_internals.keras_hub import stand_in
from keras_lora.keras_internals.layers import own_variables
from keras_lora.layers.kinds import form_of
from keras_lora.layers.kinds import kind_of
from keras_lora.layers.lora_layer import LoRALayer
from keras_lora.models.adapted_config import plain_float_config
from keras_lora.models.paths import layer_paths
from keras_lora.models.presets import plain_class_of


class Indices(np.ndarray):
    """What a converter gets in place of a tensor; some round theirs to float16."""

    def astype(self, dtype, **kwargs):
        return self


class Place(NamedTuple):
    """Where a layer's outputs and inputs are in a module of transformers."""

    module: str
    rows: np.ndarray
    columns: np.ndarray | None = None  # None: in the same order
    total: int = 0  # outputs of the module
    inputs_first: bool = False  # the module keeps its weight as (in, out)

    def without_prefix(self, prefix):
        return Place(self.module.removeprefix(prefix), *self[1:])

    @property
    def is_whole(self):
        """Whether the layer is the module, in the same order."""
        return self.columns is None and np.array_equal(self.rows, np.arange(self.total))


def placed_layers(backbone, family) -> dict:
    """Path in the backbone -> Place, for the layers that are modules there."""
    # Where the backbone is quantized or adapted, the kernels that the converter means
    # are not there.
    cls = type(backbone)
    cls = plain_class_of(cls) if hasattr(cls, "plain_owner") else cls
    config = plain_float_config(cls.get_config(backbone))
    copy = stand_in(cls, {**config, "dtype": "float32"})
    owners, sizes = {}, collections.Counter()
    paths = layer_paths(copy)
    for path, layer in paths.items():
        owners |= {id(variable): path for variable in own_variables(layer)}
    found = collections.defaultdict(dict)

    def count(variable, key, hook):
        sizes[key] += np.prod(variable.shape, dtype=int)

    def place(variable, key, hook):
        path = owners.get(id(variable))
        module, _, word = key.rpartition(".")
        if path is not None and torch_name(paths[path], variable) == word:
            placed = place_of(paths[path], variable, hook, sizes[key])
            found[path][word] = placed and Place(module, *placed[1:])

    try:
        ask(family, copy, count)
    except Exception:  # of a converter that takes images for granted, say
        if not add_absent_parts(copy):
            raise
        sizes.clear()
        ask(family, copy, count)
    ask(family, copy, place)
    places = {}
    for path in paths:
        values = list(found[path].values())
        if values and agree(values):
            first = found[path].get("weight", values[0])
            places[path] = first
    return places


def agree(places):
    """Whether all variables of a layer have their outputs at the same place."""
    first = places[0]
    return first is not None and all(
        other is not None
        and other.module == first.module
        and np.array_equal(other.rows, first.rows)
        for other in places
    )


def place_of(layer, variable, hook, size):
    """The Place of a variable, or None if a converter does more than cut and permute.

    size: of the tensor there, of which several variables may be parts.
    """
    kind, shape = kind_of(layer), tuple(variable.shape)
    if kind is LoRALayer or torch_name(layer, variable) != "weight":
        return vector_place(shape, hook, size)
    form = form_of(layer, 1)
    if form.batch_axes:
        return None
    matrix, back = form.as_matrix(np.broadcast_to(np.int32(0), shape))
    probes = [back(x) for x in indices(*matrix.shape)]
    if form.looks_up or kind.weight_to_file(layer, probes[0]).ndim != 2:
        ends = (converted(kind.weight_to_file(layer, x), hook, shape) for x in probes)
        if all(map(np.array_equal, ends, probes)):
            return whole(matrix.shape[1])
        return None
    inputs = len(matrix)
    for total, inputs_first in itertools.product(
        dict.fromkeys((size // inputs, matrix.shape[1])), (False, True)
    ):
        sources = indices(total, inputs)
        if inputs_first:
            sources = [source.T for source in sources]
        ends = [converted(source, hook, shape) for source in sources]
        if any(end is None for end in ends):
            continue
        rows, columns = (form.as_matrix(end)[0] for end in ends)
        if is_constant(rows, 0) and is_constant(columns, 1):
            rows, columns = rows[0], columns[:, 0]
            if not (is_choice(rows, total) and is_choice(columns, inputs)):
                return None
            in_order = np.array_equal(columns, np.arange(inputs))
            return Place("", rows, None if in_order else columns, total, inputs_first)
    return None


def indices(*shape):
    """The index of each row and that of each column, as matrices that hold no more."""
    rows, columns = (np.arange(size, dtype="int32") for size in shape)
    return [np.broadcast_to(x, shape) for x in (rows[:, None], columns)]


def whole(size):
    return Place("", np.arange(size), total=size)


def vector_place(shape, hook, size):
    """Of a bias, a norm, a table of positions."""
    length = np.prod(shape, dtype=int)
    sources = [np.arange(size)]
    if size == length:
        sources.append(sources[0].reshape(shape))
    for source in sources:
        rows = converted(source, hook, shape)
        if rows is not None and is_choice(rows, size):
            return Place("", rows.reshape(-1), total=int(size))
    return None


def is_choice(rows, size):
    """Whether rows are distinct indices below `size`: they were only permuted."""
    ordered = np.unique(rows)
    return len(ordered) == rows.size and ordered[0] >= 0 and ordered[-1] < size


def converted(source, hook, shape):
    """What the converter makes of a tensor; None where the tensor does not fit it."""
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
