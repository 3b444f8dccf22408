"""Adapters of microsoft/LoRA: what `loralib.lora_state_dict` gives."""

from collections.abc import Callable
from collections.abc import Mapping

import numpy as np

from keras_lora.adapter import checked_alpha
from keras_lora.adapter import checked_rank
from keras_lora.adapter_files import assert_finite
from keras_lora.adapter_files import fitted
from keras_lora.adapter_files import module_names
from keras_lora.conv import LoRAConv
from keras_lora.layer_conversion import checked_lora_layers
from keras_lora.merged_dense import LoRAMergedDense
from keras_lora.paths import layer_paths
from keras_lora.report import Report


def load_loralib(
    model,
    state_dict: Mapping,
    rank: int,
    alpha: float = 1,
    names: Mapping | Callable | None = None,
) -> Report:
    """Puts loralib's factors into the LoRA layers of a model.

    The model must hold LoRA layers where the state dict has factors, its
    convolutions with `factorization="loralib"`:

        Linear, Embedding   lora_A (r, in)       lora_B (out, r)         transposed
        MergedLinear        lora_A (G*r, in)     lora_B (G*units/n, r)   G of n slices
        Conv                lora_A (r*k, in*k)   lora_B (out/g*k, r*k)   as they are

    `fan_in_fan_out` concerns the frozen weight alone. Biases that the dict has are
    read too. Everything is checked before anything is assigned.

    Args:
        model: A Keras model that holds LoRA layers.
        state_dict: Name -> tensor or array, such as `lora_state_dict` returns.
            For a file, load it first (`torch.load(path, weights_only=True)`).
        rank: The `r` of the layers, which the dict does not hold.
        alpha: Their `lora_alpha`, which it does not hold either; loralib's default
            is 1.
        names: Module paths there for the paths here, as in `save_adapter`.

    Raises:
        ValueError: If a tensor is missing, unexpected, of a wrong shape or not
            finite, or a layer has another rank. The model is then as before.

    Reference: https://github.com/microsoft/LoRA
    """
    rank, alpha = checked_rank(rank), checked_alpha(alpha)
    adapted = {id(layer) for layer in checked_lora_layers(model)}
    modules = module_names(layer_paths(model), names)
    tensors = {key: as_array(value) for key, value in state_dict.items()}
    values, layers = [], []
    for module, layer in modules.items():
        if id(layer) not in adapted:
            continue
        if layer.lora.rank != rank:
            raise ValueError(
                f"The layer of {module!r} has rank {layer.lora.rank}. Received: "
                f"rank={rank}."
            )
        if isinstance(layer, LoRAConv) and layer.factorization != "loralib":
            raise ValueError(
                f"The convolution of {module!r} needs factorization='loralib' for "
                "loralib's factors."
            )
        for name, variable in (("lora_A", layer.lora.a), ("lora_B", layer.lora.b)):
            key = f"{module}.{name}"
            if key not in tensors:
                raise ValueError(f"The state dict has no {key!r}.")
            own = to_own(layer, name, tensors.pop(key), key)
            values.append((variable, fitted(variable, own, key)))
        layers.append(layer)
    for key, value in tensors.items():
        layer = modules.get(key.removesuffix(".bias"))
        if not key.endswith(".bias") or getattr(layer, "bias", None) is None:
            raise ValueError(f"The state dict has {key!r}, which the model has not.")
        values.append((layer.bias, fitted(layer.bias, value, key)))
    for variable, value in values:
        assert_finite(variable.path, value)
    for variable, value in values:
        variable.assign(value)
    for layer in layers:
        layer.lora.set_alpha(alpha)
    return Report(model)


def to_own(layer, name, value, key):
    """loralib's layout to the layer's."""
    if isinstance(layer, LoRAConv):
        return value
    if isinstance(layer, LoRAMergedDense) and name == "lora_B":
        groups, rank, size = layer.lora.b.shape
        if value.shape != (groups * size, rank):
            raise ValueError(
                f"{key!r} has shape {value.shape}; the layer needs "
                f"{(groups * size, rank)}."
            )
        return value.reshape(groups, size, rank).transpose(0, 2, 1)
    if value.ndim != 2:
        raise ValueError(f"{key!r} has shape {value.shape}; two axes are needed.")
    own = layer.lora.a if name == "lora_A" else layer.lora.b
    return value.T.reshape(own.shape) if value.size == np.prod(own.shape) else value.T


def as_array(value):
    """A torch tensor or an array, as float32 or float64."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.double() if "64" in str(value.dtype) else value.float()
        value = value.numpy()
    return np.array(value)
