"""A layer's adapter as PEFT's tensors, and back.

PEFT keeps what torch keeps: (out, in) for a linear layer, (out, in, *k) for a
convolution. Suffixes follow the module's name in a file.

    layer           A here             lora_A there     B here        lora_B there
    Dense           (in, r)            (r, in)          (r, out)      (out, r)
    EinsumDense     (contracted, r)    (r, in)          (r, new)      (out, r)
    MergedDense     (in, G*r)          (G*r, in)        (G, r, n)     (out, G*r) in blocks
    Embedding       (vocab, r)         (r, vocab)       (r, dim)      (dim, r)
    Conv            (*k, in, r)        (r, in, *k)      (r, out)      (out, r, 1...)
"""  # noqa: E501

import math

import keras
import numpy as np
from keras import ops

from keras_lora.layers.adapter import alpha_at
from keras_lora.layers.adapter import divisor
from keras_lora.layers.conv import LoRAConv
from keras_lora.layers.einsum_dense import LoRAEinsumDense
from keras_lora.layers.einsum_dense import split_equation
from keras_lora.layers.embedding import LoRAEmbedding
from keras_lora.layers.merged_dense import LoRAMergedDense

LINEAR = (".lora_A.weight", ".lora_B.weight")
EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")


def suffixes(layer):
    return EMBEDDING if isinstance(layer, LoRAEmbedding) else LINEAR


def file_rank(layer):
    """The rank that the file's tensors have; G * r for a merged dense layer."""
    groups = sum(getattr(layer, "adapted_slices", (True,)))
    return layer.lora.rank * groups


def file_alpha(layer, use_rslora):
    """The alpha that gives the layer's scaling with the file's rank."""
    rank = file_rank(layer)
    if use_rslora == layer.lora.use_rslora and rank == layer.lora.rank:
        return layer.lora.alpha
    return layer.lora.scaling * divisor(rank, use_rslora)


def own_alpha(layer, alpha, use_rslora):
    """The inverse of `file_alpha`: the layer's alpha for a file's alpha."""
    rank = file_rank(layer)
    if rank == layer.lora.rank:
        return alpha
    return alpha_at(layer.lora.rank, alpha, rank, use_rslora)


def is_exchangeable(layer):
    """Whether PEFT has a form for this adapter."""
    if isinstance(layer, LoRAConv):
        return layer.factorization == "standard" and layer.groups == 1
    if isinstance(layer, LoRAEinsumDense):
        return not split_equation(layer.equation).batch
    return True


def to_tensors(layer):
    """A and B in PEFT's layout, contiguous."""
    a, b = to_numpy(layer.lora.a), to_numpy(layer.lora.b)
    if isinstance(layer, LoRAMergedDense):
        a, b = a.T, to_numpy(layer.spread(layer.lora.b)).T
    elif isinstance(layer, LoRAConv) and layer.factorization == "standard":
        a = np.moveaxis(a, (-1, -2), (0, 1))
        b = b.T.reshape(*b.T.shape, *[1] * (a.ndim - 2))
    elif is_exchangeable(layer):
        rank = layer.lora.rank
        a, b = a.reshape(-1, rank).T, b.reshape(rank, -1).T
    return np.ascontiguousarray(a), np.ascontiguousarray(b)


def from_tensors(layer, a, b, where):
    """The inverse of `to_tensors`; a ValueError where shapes do not fit."""
    expected_a, expected_b = to_tensors(layer)
    for name, found, expected in (("A", a, expected_a), ("B", b, expected_b)):
        if found.shape != expected.shape:
            reason = ""
            if isinstance(layer, LoRAConv) and layer.groups > 1:
                reason = (
                    " The convolution has groups: PEFT's form for it cannot be merged, "
                    "and is not read."
                )
            raise ValueError(
                f"{name} of {where!r} has shape {found.shape} in the file; the layer "
                f"needs {expected.shape}.{reason}"
            )
    own_a, own_b = layer.lora.a.shape, layer.lora.b.shape
    if isinstance(layer, LoRAMergedDense):
        return layer.gather(a.T, b.T, where)
    if isinstance(layer, LoRAConv) and layer.factorization == "standard":
        return np.moveaxis(a, (0, 1), (-1, -2)), b.reshape(b.shape[:2]).T
    if is_exchangeable(layer):
        return a.T.reshape(own_a), b.T.reshape(own_b)
    return a, b


# Keras's word for a layer's own variable, and torch's.
TORCH_NAMES = {
    "kernel": "weight",
    "embeddings": "weight",
    "position_embeddings": "weight",
    "gamma": "weight",
    "scale": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


def torch_name(variable):
    return TORCH_NAMES.get(variable.name, variable.name)


def weight_to_tensor(layer, variable, inputs_first=False):
    """A variable that trained in full, with torch's axes for it.

    inputs_first: the module keeps (in, out), as `fan_in_fan_out` says.
    """
    value = to_numpy(variable)
    if variable.name == "bias":
        return value.reshape(-1)
    if variable.name == "kernel" and value.ndim > 1:
        if as_matrix(layer):
            axes, rows, _ = as_matrix(layer)
            value = value.transpose(axes).reshape(rows, -1)
        if not (inputs_first and value.ndim == 2):
            value = np.moveaxis(value, (-1, -2), (0, 1))
    return np.ascontiguousarray(value)


def weight_from_tensor(layer, variable, value, where, inputs_first=False):
    """The inverse; a ValueError where shapes do not fit."""
    expected = weight_to_tensor(layer, variable, inputs_first).shape
    if value.shape != expected:
        raise ValueError(
            f"The tensor {where!r} has shape {value.shape}; the model needs {expected}."
        )
    if variable.name == "kernel" and value.ndim > 1:
        if not (inputs_first and value.ndim == 2):
            value = np.moveaxis(value, (0, 1), (-1, -2))
        if as_matrix(layer):
            axes, _, sizes = as_matrix(layer)
            value = value.reshape(sizes).transpose(np.argsort(axes))
    return value.reshape(variable.shape)


def as_matrix(layer):
    """How an einsum kernel becomes (inputs, outputs): axes, rows, sizes; else None."""
    if not isinstance(layer, keras.layers.EinsumDense):
        return None
    split = split_equation(layer.equation)
    if split.batch:
        return None
    axes = [split.kernel.index(axis) for axis in split.contracted + split.new]
    sizes = [layer.kernel.shape[axis] for axis in axes]
    return axes, math.prod(sizes[: len(split.contracted)]), sizes


def to_numpy(value):
    value = ops.convert_to_tensor(value)
    if "float" in str(value.dtype) and "64" not in str(value.dtype):
        value = ops.cast(value, "float32")
    return np.array(ops.convert_to_numpy(value))
