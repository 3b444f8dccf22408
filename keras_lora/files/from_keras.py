"""Adapters that Keras's own `enable_lora` has trained, and KerasHub's files of them."""

import math
from pathlib import Path

import h5py
import keras
import numpy as np

from keras_lora.files.config import settings
from keras_lora.files.folder import Adapter
from keras_lora.files.load import load_adapter
from keras_lora.files.tensors import EMBEDDING
from keras_lora.files.tensors import LINEAR
from keras_lora.files.tensors import to_numpy
from keras_lora.keras_internals import flatten_layers
from keras_lora.layers.adapter import LowRankAdapter
from keras_lora.layers.einsum_dense import split_equation
from keras_lora.models.paths import layer_paths
from keras_lora.models.report import Report


def load_keras_lora(model, source) -> Report:
    """Puts the factors of Keras's own `enable_lora` into a model, exactly.

    Keras splits an einsum kernel before its last axis, wherever the equation has
    its new axes. With L new axes before the last one the same update has rank L * r
    here: a query of L heads, for example. Other layers keep their rank.

    Keras's `.keras` and `.weights.h5` files hold the merged kernel and no factors;
    for those, take `extract_adapter` of the model before and after.

    Args:
        model: A Keras model that is built: plain, or with adapters of these ranks.
        source: A `.lora.h5` file that KerasHub's `save_lora_weights` has written,
            for a model that is or has the same backbone; or a model of the same
            layers on some of which `enable_lora` was called.

    Raises:
        ValueError: If there are no factors, or they do not fit the model, which is
            then as before.
        OSError: If the file cannot be read.
    """
    if isinstance(source, (str, Path)):
        found = factors_of_file(model, source)
    else:
        found = factors_of_model(model, source)
    tensors, ranks, alphas = {}, {}, {}
    paths = {id(layer): path for path, layer in layer_paths(model).items()}
    for layer, a, b, scaling in found:
        module = paths[id(layer)].replace("/", ".")
        suffixes = EMBEDDING if isinstance(layer, keras.layers.Embedding) else LINEAR
        a, b = converted(layer, a, b, module)
        tensors[module + suffixes[0]], tensors[module + suffixes[1]] = a, b
        ranks[module], alphas[module] = len(a), scaling * len(a)
    return load_adapter(model, Adapter(tensors, settings(ranks, alphas, False)))


def factors_of_file(model, path):
    """[(layer, A, B, scaling)]; KerasHub counts the layers that have weights."""
    backbone = getattr(model, "backbone", model)
    layers = [
        layer
        for layer in flatten_layers(backbone)
        if layer is not backbone
        and layer.weights
        and not isinstance(layer, LowRankAdapter)
    ]
    found = []
    with h5py.File(path, "r") as file:
        for index in file.get("lora", ()):
            if index == "vars":
                continue
            if not index.isdigit() or int(index) >= len(layers):
                raise ValueError(f"{path} has a layer {index!r}, the model has not.")
            group = file[f"lora/{index}"].get("vars", {})
            if not {"lora_kernel_a", "lora_kernel_b"} <= group.keys():
                raise ValueError(f"{path} has no factors for its layer {index!r}.")
            a, b = group["lora_kernel_a"][()], group["lora_kernel_b"][()]
            found.append((layers[int(index)], a, b, 1.0))
    if not found:
        raise ValueError(f"{path} is no .lora.h5 file: it has no factors.")
    return found


def factors_of_model(model, source):
    own, found = layer_paths(model), []
    for path, layer in layer_paths(source).items():
        if not getattr(layer, "lora_enabled", False):
            continue
        if path not in own:
            raise ValueError(f"The model has no layer {path!r}.")
        if isinstance(layer, keras.layers.Embedding):
            a, b = layer.lora_embeddings_a, layer.lora_embeddings_b
        else:
            a, b = layer.lora_kernel_a, layer.lora_kernel_b
        scaling = layer.lora_alpha / layer.lora_rank
        found.append((own[path], to_numpy(a), to_numpy(b), scaling))
    if not found:
        raise ValueError(f"`enable_lora` was called on no layer of {source.name!r}.")
    return found


def converted(layer, a, b, module):
    """Keras's A (*kernel axes but the last, r) and B (r, last), as PEFT's tensors."""
    kernel = getattr(layer, "kernel", None)
    if kernel is None:
        kernel = getattr(layer, "embeddings", None)
    shape = () if kernel is None else tuple(kernel.shape)
    if a.shape[:-1] != shape[:-1] or b.shape != (a.shape[-1], *shape[-1:]):
        raise ValueError(
            f"The factors of {module!r} have shapes {a.shape} and {b.shape}, which do "
            f"not fit its kernel of shape {shape}."
        )
    if isinstance(layer, keras.layers.EinsumDense):
        return converted_einsum(layer, a, b, module)
    if len(shape) > 2:
        b = b.T.reshape(*b.T.shape, *[1] * (len(shape) - 2))
        return np.ascontiguousarray(np.moveaxis(a, (-1, -2), (0, 1))), b
    return a.T.copy(), b.T.copy()


def converted_einsum(layer, a, b, module):
    split = split_equation(layer.equation)
    *lead, last = split.kernel
    if split.batch or last not in split.new:
        raise ValueError(
            f"Keras's factors of {module!r} have no form of a low rank here: its "
            f"equation is {layer.equation!r}."
        )
    size = dict(zip(split.kernel, layer.kernel.shape, strict=True))
    heads = [axis for axis in lead if axis in split.new]
    order = [lead.index(axis) for axis in [*split.contracted, *heads]]
    count = math.prod(size[axis] for axis in heads)
    rows = math.prod(size[axis] for axis in split.contracted)
    a = a.transpose(*order, len(lead)).reshape(rows, -1)
    return a.T.copy(), np.kron(np.eye(count, dtype=b.dtype), b.T)
