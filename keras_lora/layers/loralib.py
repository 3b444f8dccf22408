"""microsoft/LoRA's factors, where they differ from those of PEFT."""

import math

import numpy as np
from keras import ops

from keras_lora.layers import form
from keras_lora.layers.form import LowRankForm


def validate_factorization(factorization):
    if factorization not in ("standard", "loralib"):
        raise ValueError(
            '`factorization` must be "standard" (a convolution to rank channels, then '
            '1x1) or "loralib" (the shapes of microsoft/LoRA). Received: '
            f"factorization={factorization!r}."
        )
    return factorization


def loralib_convolution(layer, rank):
    """The form of a convolution with microsoft/LoRA's factors."""
    *kernel_size, group_channels, filters = layer.kernel_shape
    last, other_sizes = kernel_size[-1], math.prod(kernel_size[:-1])
    channels = group_channels * layer.groups

    def compose(a, b):
        # microsoft/LoRA: (B @ A).view(filters, channels/groups, *kernel_size)
        shape = (filters, group_channels, *kernel_size)
        # Not ops.matmul, which on torch returns float32 for float64.
        product = ops.reshape(ops.einsum("ij,jk->ik", b, a), shape)
        return ops.transpose(product, (*range(2, len(shape)), 1, 0))

    return LowRankForm(
        a_shape=(rank * last, channels * last),
        b_shape=(filters // layer.groups * other_sizes, rank * last),
        fan_in=channels * last,
        compose=compose,
        # The reshape mixes channels with positions, so the kernel has to be formed.
        down=lambda inputs, a: (inputs, a),
        up=lambda hidden, b: layer.linear(hidden[0], compose(hidden[1], b)),
        input_axes=tuple(range(layer.rank + 1)),
        over_outputs=layer.over_outputs,
        to_file=form.unchanged,
        from_file=form.unchanged,
        one_rank=False,
    )


def convert_convolution(layer, a, b, rank, module):
    """Converts loralib's factors to a convolution of rank r * prod(k) and a 1x1.

    delta[f] = (B @ A)[f*m : (f+1)*m] in a row, m = prod(k[:-1]): with m copies of A
    on a block diagonal, row f*m + s of B acts on the s-th copy.
    """
    if layer.groups > 1:
        raise ValueError(
            f"The convolution of {module!r} has groups: loralib's factors fit it with "
            "factorization='loralib' only."
        )
    *other_sizes, last = layer.kernel_size
    copies, channels = math.prod(other_sizes), layer.kernel.shape[-2]
    expected = (rank * last, channels * last), (layer.filters * copies, rank * last)
    if (a.shape, b.shape) != expected:
        raise ValueError(
            f"The factors of {module!r} have shapes {a.shape} and {b.shape}; the layer "
            f"needs {expected[0]} and {expected[1]}."
        )
    a = np.kron(np.eye(copies, dtype=a.dtype), a)
    a = a.reshape(-1, channels, *layer.kernel_size)
    b = np.concatenate([b[start::copies] for start in range(copies)], axis=1)
    return a, b.reshape(*b.shape, *[1] * len(layer.kernel_size))


def validate_mask(enable_lora, units):
    mask = tuple(enable_lora) if isinstance(enable_lora, (list, tuple)) else ()
    if not mask or not all(isinstance(enabled, (bool, np.bool_)) for enabled in mask):
        raise ValueError(
            "`enable_lora` must be a list or tuple of Booleans, one per slice of "
            f"the kernel. Received: enable_lora={enable_lora!r}."
        )
    if not any(mask):
        raise ValueError(
            "`enable_lora` adapts no slice. Received: "
            f"enable_lora={enable_lora!r}. Set one slice to True, or use rank=0."
        )
    if units % len(mask):
        raise ValueError(
            "`units` must be divisible by the number of slices in `enable_lora`. "
            f"Received: units={units}, {len(mask)} slices."
        )
    return tuple(bool(enabled) for enabled in mask)


def convert_merged_linear(layer, a, b, rank, mask, module):
    """Converts loralib's factors of a MergedLinear or Linear to one linear module.

    Its rank is G * r: A is unchanged, B is in blocks.
    """
    groups = len(a) // rank
    if a.ndim != 2 or b.ndim != 2 or len(a) != groups * rank or b.shape[1] != rank:
        raise ValueError(
            f"The factors of {module!r} have shapes {a.shape} and {b.shape}, which are "
            f"not those of rank={rank}."
        )
    if groups == 1 and len(b) == layer.units:
        return a, b  # of a Linear
    mask = validate_mask(mask or (True,) * groups, layer.units)
    size = layer.units // len(mask)
    if sum(mask) != groups or len(b) != groups * size:
        raise ValueError(
            f"The factors of {module!r} have shapes {a.shape} and {b.shape}; with "
            f"enable_lora={mask} and {layer.units} units that is "
            f"{(sum(mask) * rank, a.shape[1])} and {(sum(mask) * size, rank)}."
        )
    blocks = np.zeros((layer.units, groups * rank), b.dtype)
    for group, block in enumerate(np.flatnonzero(mask)):
        rows = slice(block * size, (block + 1) * size)
        columns = slice(group * rank, (group + 1) * rank)
        blocks[rows, columns] = b[group * size : (group + 1) * size]
    return a, blocks
