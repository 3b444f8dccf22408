"""Adapters of microsoft/LoRA, from the state dict of `loralib.lora_state_dict`."""

import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import keras
import numpy as np

from keras_lora.files import disk, load
from keras_lora.files.config import make_config
from keras_lora.files.folder import Adapter
from keras_lora.files.names import modules_of
from keras_lora.files.tensors import weight_key
from keras_lora.layers import kinds, settings
from keras_lora.layers.settings import Settings
from keras_lora.models import sites
from keras_lora.models.report import Report


def load_loralib(
    model: keras.layers.Layer,
    state_dict: Mapping | str | Path,
    rank: int,
    alpha: float = 1,
    names: str | Mapping | Callable | None = None,
    enable_lora: Sequence | Mapping | None = None,
) -> Report:
    """Loads the factors of loralib (microsoft/LoRA) into a model.

    A plain model gets LoRA layers where the state dict has factors. A model that has
    adapters must have them there, with the ranks in the last column:

        Linear, Embedding   lora_A (r, in)       lora_B (out, r)         r
        MergedLinear        lora_A (G*r, in)     lora_B (G*units/n, r)   r, or G*r
        Conv                lora_A (r*k, in*k)   lora_B (out/g*k, r*k)   r, or r*k*k

    The second rank is for a Dense layer instead of LoRAMergedDense, and for a
    convolution without groups in the standard form instead of
    `factorization="loralib"`; both hold the same update exactly. `fan_in_fan_out`
    concerns only the frozen weight. Biases in the dict are read too. Everything is
    checked before anything is assigned.

    Args:
        model: A Keras model that is built.
        state_dict: Name -> tensor or array, as `lora_state_dict` returns it, or a file:
            .safetensors, or one that `torch.save` has written (needs torch, which
            then unpickles only tensors).
        rank: The `r` of the layers, which is not in the dict.
        alpha: Their `lora_alpha`, which is not in the dict either; 1 is loralib's
            default.
        names: Their module names for the paths of this model, as in `save_adapter`.
        enable_lora: For plain layers that get the factors of a MergedLinear: its
            mask, if not all slices are adapted; or a dict from modules to masks.

    Returns:
        A report like that of `apply_lora`.

    Raises:
        ValueError: If a tensor is missing, unexpected, of a wrong shape or not
            finite, or a layer has another rank. The model is left unchanged.
        OSError: If the file cannot be read.

    Reference: https://github.com/microsoft/LoRA

    Examples:
        >>> state_dict = {"0.lora_A": np.ones((4, 6)), "0.lora_B": np.ones((8, 4))}
        >>> report = keras_lora.load_loralib(base, state_dict, 4, names={"dense": "0"})
        >>> [(row.path, row.rank) for row in report]
        [('dense', 4)]
    """
    given = Settings(rank, settings.validate_alpha(alpha))
    if isinstance(state_dict, (str, Path)):
        state_dict = read_state_dict(Path(state_dict))
    if not isinstance(state_dict, Mapping):
        raise ValueError(
            "`state_dict` must be what `loralib.lora_state_dict(model)` returns, or a "
            f"file of it. Received: {type(state_dict).__name__}."
        )
    paths = sites.Paths(model)
    modules = modules_of(paths, names)
    arrays = {key: to_array(key, value) for key, value in state_dict.items()}
    tensors, settings_of = {}, {}
    for key in [key for key in arrays if key.endswith(".lora_A")]:
        module = key.removesuffix(".lora_A")
        layer, b_key = modules.get(module), f"{module}.lora_B"
        if layer is None:
            raise ValueError(
                f"The state dict has {key!r}, which the model does not have."
            )
        if b_key not in arrays:
            raise ValueError(f"The state dict has no {b_key!r}.")
        a, b = arrays.pop(key), arrays.pop(b_key)
        if a.ndim < 2 or b.ndim < 2:
            raise ValueError(
                f"The factors of {module!r} have shapes {a.shape} and {b.shape}."
            )
        mask = enable_lora.get(module) if isinstance(enable_lora, dict) else enable_lora
        kind = kinds.kind_of(layer)
        a, b = kind.read_loralib(layer, a, b, given.rank, mask, module)
        suffixes = kind.file_suffixes
        tensors[module + suffixes[0]], tensors[module + suffixes[1]] = a, b
        loralib_form = getattr(layer, "factorization", None) == "loralib"
        settings_of[module] = given.with_rank(given.rank if loralib_form else len(a))
    if not settings_of:
        raise ValueError("The state dict holds no lora_A.")
    biases = {}
    for key, value in arrays.items():
        module = key.removesuffix(".bias")
        if module not in modules:  # loralib wraps torch's convolutions
            module = module.removesuffix(".conv")
        if not key.endswith(".bias") or not hasattr(modules.get(module), "bias"):
            raise ValueError(
                f"The state dict has {key!r}, which the model does not have."
            )
        biases[weight_key(module, "bias", settings_of)] = value
    bias = "lora_only" if biases else None
    if any(".base_layer." not in key for key in biases):
        bias = "all"
    config = make_config(settings_of, bias=bias)
    return load.load_into(paths, Adapter(tensors | biases, config), names)


def read_state_dict(path):
    if path.suffix == ".safetensors":
        return disk.read_tensors(path)[0]
    disk.refuse_unreadable_file(path)
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f"{path} was written by torch, which is not installed. Save the state dict "
            "as .safetensors instead."
        ) from error
    size = path.stat().st_size
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                if sum(part.file_size for part in file.infolist()) > size:
                    raise ValueError("it is compressed, which torch.save does not do")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, Mapping):
            raise ValueError(f"it is a {type(state).__name__}")
        tensors = [value for value in state.values() if hasattr(value, "numel")]
        if sum(value.numel() * value.element_size() for value in tensors) > size:
            raise ValueError("it describes more values than it holds")
    except OSError:
        raise
    except Exception as error:  # of zip, pickle, or an early end of the file
        raise ValueError(f"{path} holds no usable state dict: {error}") from error
    return state


def to_array(key, value):
    """A torch tensor or an array, as float32 or float64."""
    try:
        if hasattr(value, "detach"):
            value = value.detach().cpu()
            if not value.is_floating_point():
                raise TypeError(f"it is of {value.dtype}")
            value = value if "float64" in str(value.dtype) else value.float()
            value = value.numpy()
        value = np.array(value)
        if not isinstance(key, str) or value.dtype.kind not in "fV":
            raise TypeError(f"it is of {value.dtype}")
        return value if value.dtype == "float64" else value.astype("float32")
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            "The state dict must map names to dense tensors of floats. Received "
            f"{key!r}: {error}."
        ) from error
