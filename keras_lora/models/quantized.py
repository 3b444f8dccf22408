"""Quantized layers of a model: corrected where Keras is wrong, and kept in files."""

import itertools

import keras

from keras_lora.keras_internals import classes
from keras_lora.keras_internals.layer_state import drop_float_kernel, take_own_policy
from keras_lora.layers import kinds, quantized_host
from keras_lora.layers.lora_layer import LoRALayer


def fix_quantized(layers) -> list:
    """Corrects quantized layers that Keras gets wrong, and returns them.

    Layers without an adapter too: their gradients reach the adapters before them, and
    their integers are in the same file.
    """
    every = list(layers)
    layers = [layer for layer in every if layer.quantization_mode is not None]
    for layer in layers:
        take_own_policy(layer)
    renew_policy_maps(every)
    mended = [layer for layer in layers if is_wrong_in_keras(layer)]
    for layer in mended:
        classes.change_class(layer, kinds.lora_class_of(type(layer)))  # type: ignore[arg-type]
    return mended


def renew_policy_maps(layers):
    """Updates the maps of policies of loaded KerasHub models to the layers' policies.

    A model saves its map in its configuration, and is built with it when it is loaded.
    """
    policies = [layer.dtype_policy for layer in layers]
    is_map = [isinstance(x, keras.dtype_policies.DTypePolicyMap) for x in policies]
    maps = {id(x): x for x in itertools.compress(policies, is_map)}
    for policy_map in maps.values():
        for layer, policy, has_map in zip(layers, policies, is_map, strict=True):
            path, mode = layer.path, policy.quantization_mode
            if has_map or path is None or policy_map[path].quantization_mode == mode:
                continue
            if path in policy_map:
                del policy_map[path]
            if policy_map[path].quantization_mode != mode:  # set by an expression
                policy_map[path] = policy


def is_wrong_in_keras(layer):
    if isinstance(layer, LoRALayer):
        return False
    lora_class = kinds.lora_class_of(type(layer))
    if lora_class is None:
        return False
    return lora_class.mends_gradient or quantized_host.is_calibrated(
        layer, lora_class.kernel_name
    )


def quantizations(layers) -> dict:
    """Path -> how a layer is quantized, for a configuration.

    The configuration of an owner such as MultiHeadAttention lacks it for sublayers.

    Args:
        layers: Path -> layer.

    Raises:
        ValueError: If Keras's files would leave out the kernel of a layer.
    """
    for layer in layers.values():
        refuse_uncalibrated(layer)
    serialize = keras.saving.serialize_keras_object
    return {
        path: [
            layer.quantization_mode,
            serialize(quantization_config(layer)),
            serialize(getattr(layer, "inputs_quantizer", None)),
        ]
        for path, layer in layers.items()
        if layer.quantization_mode
        in (*quantized_host.MODES, *quantized_host.CALIBRATED)
    }


def refuse_uncalibrated(layer):
    lora_class = kinds.lora_class_of(type(layer)) or type(layer)
    mode = layer.quantization_mode
    if mode in quantized_host.CALIBRATED and not quantized_host.is_calibrated(
        layer, lora_class.kernel_name
    ):
        raise ValueError(
            f"{layer.path!r} is quantized with {mode!r} but was not calibrated: Keras "
            "computes with its float kernel, but saves only the integers. Leave it out "
            "with `filters` of `Model.quantize`."
        )


def quantize_again(layer, mode, config, *of_inputs):
    """Quantizes a layer that was created in float, before its values are loaded.

    `of_inputs` is the quantizer of its inputs, which older files do not have; a layer
    that was quantized by its policy does not know it.
    """
    if layer is None or not layer.built:
        return
    config = keras.saving.deserialize_keras_object(config)
    if layer.quantization_mode is None:
        layer.quantize(mode, type_check=False, config=config)
    elif of_inputs and hasattr(layer, "inputs_quantizer"):
        layer.quantization_config = config
        (layer.inputs_quantizer,) = map(
            keras.saving.deserialize_keras_object, of_inputs
        )
    if mode in quantized_host.CALIBRATED:
        drop_float_kernel(layer)


def quantization_config(layer):
    """Returns how the layer was quantized; if unknown, what its policy says."""
    config = getattr(layer, "quantization_config", None)
    block_size = getattr(quantized_host.policy_of(layer), "block_size", None)
    if config is None and block_size is not None:
        return keras.quantizers.Int4QuantizationConfig(block_size=block_size)
    return config
