"""Merging into layers whose kernel is quantized."""

import contextlib
from typing import NamedTuple

import keras
import numpy as np

from keras_lora.keras_internals.classes import seen_as
from keras_lora.keras_internals.classes import twin
from keras_lora.keras_internals.distribution import fetch
from keras_lora.keras_internals.distribution import is_cut
from keras_lora.keras_internals.distribution import on_host
from keras_lora.keras_internals.distribution import own_strategy
from keras_lora.keras_internals.distribution import put
from keras_lora.keras_internals.kernels import exchange_variables
from keras_lora.keras_internals.kernels import kernel_variables
from keras_lora.keras_internals.layers import name_scopes
from keras_lora.layers.quantized_host import CALIBRATED
from keras_lora.layers.torch_layout import to_numpy
from keras_lora.models.quantized import quantization_config

WAYS = ("dequantize", "requantize")


class MergedLayer(NamedTuple):
    """A merged layer; error: |kernel - (W + delta)| / |W + delta|."""

    path: str
    layer: object
    error: float


def checked_way(layers, way):
    """Returns how to merge quantized layers; raises ValueError if it is not given."""
    if way is not None and way not in WAYS:
        raise ValueError(
            f"`quantized` must be None, 'dequantize' or 'requantize'. Received: {way!r}"
        )
    if layers and way is None:
        names = ", ".join(repr(layer.name) for layer in layers[:5])
        raise ValueError(
            f"The kernels of {len(layers)} adapted layers are quantized ({names}), and "
            "no integers represent W + delta exactly. Choose how to merge: "
            'quantized="dequantize" gives float layers with the dequantized W + delta, '
            'which need the memory of float kernels; quantized="requantize" quantizes '
            "W + delta again, and the report has each layer's error. `export` keeps "
            "the quantized kernels, with A and B as they are."
        )
    if way == "requantize":
        refuse_calibrating("requantize", layers)


def refuse_calibrating(word, layers):
    """Raises ValueError where quantizing a kernel again would need calibration data."""
    for layer in layers:
        if layer.quantization_mode in CALIBRATED:
            raise ValueError(
                f"{word!r} quantizes kernels again, but the inputs that Keras has "
                f"calibrated {layer.name!r} with ({layer.quantization_mode!r}) are not "
                'kept. merge_lora(model, quantized="dequantize") makes a float model, '
                "which `Model.quantize` can calibrate again."
            )


def merged_plain(layer, kernel, way):
    """Makes a plain layer with this kernel, in float or quantized again."""
    config = seen_as(layer, layer.plain_class).get_config()
    config["dtype"] = float_policy(layer).name
    config.pop("quantization_config", None)
    plain = layer.plain_class.from_config(config)
    requantize = way == "requantize"
    owner = layer.path.removesuffix(layer.name)
    with contextlib.ExitStack() as scopes:
        scopes.enter_context(own_strategy(layer))
        scopes.enter_context(name_scopes(owner))  # by paths a layout map knows them
        values = {layer.kernel_name: kernel, **layer.other_kernels()}
        if requantize and is_cut(layer.frozen_kernel):  # Keras does it on hosts
            values = {name: fetch(value) for name, value in values.items()}
            scopes.enter_context(on_host())
        plain.build_from_config(layer.get_build_config())
        for variable in kernel_variables(plain).values():
            put(variable, values[variable.name])
        if requantize:
            config, mode = quantization_config(layer), layer.quantization_mode
            plain.quantize(mode, config=config, type_check=False)
    return plain


def relative_error(layer, plain):
    """Of the kernel of a plain layer, as its operation means it.

    In A's dtype: in half precision W + delta would be rounded as the kernel is.
    """
    dtype = layer.lora.variable_dtype
    kernel = twin(plain, type(layer), {}).base_kernel(dtype)
    found, wanted = (
        to_numpy(x).astype("float64") for x in (kernel, layer.merged_kernel(dtype))
    )
    return float(np.linalg.norm(found - wanted) / (np.linalg.norm(wanted) or 1.0))


def copy_kernel(layer, plain):
    """Gives a layer the kernel, scales and policy of a plain one like it."""
    if plain.quantization_mode is not None:
        own = kernel_variables(layer)
        for name, variable in kernel_variables(plain).items():
            put(own[name], fetch(variable) if is_cut(own[name]) else variable)
        return
    exchange_variables(layer, plain)
    layer.dtype_policy = float_policy(layer)


def float_policy(layer):
    """The policy that the layer had before it was quantized.

    By its dtypes: a map of policies takes their names away when it is saved.
    """
    compute, variable = layer.compute_dtype, layer.variable_dtype
    return keras.dtype_policies.get(
        compute if compute == variable else f"mixed_{compute}"
    )
