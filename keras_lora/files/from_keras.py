"""Adapters of Keras's own `enable_lora`, from a model or from KerasHub's files."""

import math
import os
from pathlib import Path

import keras
import numpy as np

from keras_lora.files import config, disk, load
from keras_lora.files.folder import Adapter
from keras_lora.keras_internals.layer_state import flatten_layers
from keras_lora.layers import kinds, torch_layout
from keras_lora.layers.adapter import LowRankAdapter
from keras_lora.layers.settings import Settings
from keras_lora.models import sites
from keras_lora.models.report import Report


def load_keras_lora(
    model: keras.layers.Layer, source: keras.layers.Layer | str | Path
) -> Report:
    """Loads the factors of Keras's own `enable_lora` into a model, exactly.

    Keras splits an einsum kernel before its last axis, whatever its equation says. For
    a query projection of L heads, the same update therefore has rank L * r here.
    Other layers keep their rank.

    Keras's `.keras` and `.weights.h5` files hold the merged kernel without factors;
    for those, use `extract_adapter` with the model before and after.

    Args:
        model: A Keras model that is built: plain, or with adapters of these ranks.
        source: A `.lora.h5` file that KerasHub's `save_lora_weights` has written for
            the same backbone, or a model of the same layers with Keras's adapters.

    Returns:
        A report like that of `apply_lora`.

    Raises:
        ValueError: If there are no factors, or they do not fit the model. The model
            is left unchanged.
        OSError: If the file cannot be read.

    Examples:
        >>> plain = keras.models.clone_model(base)
        >>> base.layers[0].enable_lora(rank=4)
        >>> report = keras_lora.load_keras_lora(plain, base)
        >>> [(row.path, row.rank) for row in report]
        [('dense', 4)]
    """
    paths = sites.Paths(model)
    if isinstance(source, (str, Path)):
        factors = read_factors(model, source)
    elif not isinstance(source, keras.layers.Layer):
        raise ValueError(
            "`source` must be a .lora.h5 file or a Keras model. Received: "
            f"{type(source).__name__}."
        )
    else:
        factors = factors_of_model(paths.layers, source)
    tensors, settings = {}, {}
    for layer, a, b, scaling in factors:
        module = paths.path_of[id(layer)].replace("/", ".")
        suffixes = kinds.kind_of(layer).file_suffixes
        a, b = factors_in_file(layer, a, b, module)
        tensors[module + suffixes[0]], tensors[module + suffixes[1]] = a, b
        settings[module] = Settings(len(a), scaling * len(a))
    adapter = Adapter(tensors, config.make_config(settings))
    return load.load_into(paths, adapter)


def read_factors(model, path):
    try:
        return factors_of_file(model, path)
    except (OSError, ValueError):
        raise
    except Exception as error:  # h5py has many for a damaged file
        raise ValueError(f"{path} is damaged: {error!r}") from error


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
    disk.refuse_unreadable_file(path)
    try:
        import h5py
    except ImportError as error:
        raise ValueError(
            f"{path} is an HDF5 file: install h5py to read it, or load it into a model "
            "of KerasHub and give that model."
        ) from error
    factors_by_layer = []
    with h5py.File(path, "r") as file:
        lora = member(file, "lora", h5py.Group) if "lora" in file else {}
        for index in lora:
            if index == "vars":
                continue
            if not index.isdecimal() or int(index) >= len(layers):
                raise ValueError(
                    f"{path} has a layer {index!r}, which the model does not have."
                )
            group = member(lora, index, h5py.Group)
            group = member(group, "vars", h5py.Group) if "vars" in group else {}
            if not {"lora_kernel_a", "lora_kernel_b"} <= group.keys():
                raise ValueError(f"{path} has no factors for its layer {index!r}.")
            factors = [
                values_of(member(group, f"lora_kernel_{x}", h5py.Dataset), path)
                for x in "ab"
            ]
            factors_by_layer.append((layers[int(index)], *factors, 1.0))
    if not factors_by_layer:
        raise ValueError(f"{path} is not a .lora.h5 file: it has no factors.")
    return factors_by_layer


def member(group, name, kind):
    """Returns a member of an HDF5 group, and refuses links into other files."""
    link = type(group.get(name, getlink=True)).__name__
    if link != "HardLink" or not isinstance(group[name], kind):
        raise ValueError(
            f"{group.file.filename}: {group.name}/{name} must be a {kind.__name__} in "
            "the file itself, not a link."
        )
    return group[name]


def values_of(dataset, path):
    """Returns the values of a dataset that is stored whole in the file, as by Keras."""
    if dataset.dtype.kind != "f" or dataset.shape is None or len(dataset.shape) < 2:
        raise ValueError(f"{path}: {dataset.name} is not a matrix of floats.")
    # Chunks could be filled in or unpacked to any size.
    elsewhere = dataset.external or dataset.is_virtual or dataset.chunks
    if elsewhere or dataset.nbytes > os.path.getsize(path):
        raise ValueError(
            f"{path}: the values of {dataset.name} are outside the file or compressed. "
            "KerasHub stores them plainly: save the file with it again."
        )
    return dataset[()]


def factors_of_model(layers_by_path, source):
    """[(layer, A, B, scaling)] for what `enable_lora` made in another model.

    layers_by_path: Those of the model that gets them.
    """
    factors = []
    for path, layer in sites.layers_by_path(source).items():
        if not getattr(layer, "lora_enabled", False):
            continue
        if path not in layers_by_path:
            raise ValueError(f"The model has no layer {path!r}.")
        name = kinds.kind_of(layer).kernel_name
        pair = (getattr(layer, f"lora_{name}_{factor}") for factor in "ab")
        scaling = layer.lora_alpha / layer.lora_rank
        a, b = map(torch_layout.to_numpy, pair)
        factors.append((layers_by_path[path], a, b, scaling))
    if not factors:
        raise ValueError(f"No layer of {source.name!r} has Keras's `enable_lora`.")
    return factors


def factors_in_file(layer, a, b, module):
    """Keras's A (*kernel axes but the last, r) and B (r, last), as a file has them."""
    kind = kinds.kind_of(layer)
    kernel = getattr(layer, kind.kernel_name, None)
    shape = () if kernel is None else tuple(kernel.shape)
    if a.shape[:-1] != shape[:-1] or b.shape != (a.shape[-1], *shape[-1:]):
        raise ValueError(
            f"The factors of {module!r} have shapes {a.shape} and {b.shape}, which do "
            f"not fit its kernel of shape {shape}."
        )
    form = kinds.form_of(layer, 1)
    last = len(shape) - 1
    if form.batch_axes or last in form.input_axes:
        raise ValueError(
            f"Keras's factors of {module!r} cannot be written as a low-rank update "
            f"here: its equation is {layer.equation!r}."
        )
    # In Keras, output axes before the last one, such as heads, belong to A.
    heads = [axis for axis in range(last) if axis not in form.input_axes]
    count = math.prod(shape[axis] for axis in heads)
    form = kinds.form_of(layer, count * len(b))
    a = a.transpose(*form.input_axes, *heads, last).reshape(form.a_shape)
    b = np.kron(np.eye(count, dtype=b.dtype), b).reshape(form.b_shape)
    return form.to_file(a, b)
