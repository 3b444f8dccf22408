"""merge_lora and remove_lora: LoRA layers become plain Keras layers again, in place."""

import contextlib
import math
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_lora.keras_internals import (
    classes,
    compiled,
    distribution,
    layer_state,
    warn_caller,
)
from keras_lora.layers import lora_layer, quantized_host, torch_layout
from keras_lora.layers.lora_layer import LoRALayer
from keras_lora.models import sites, training_state
from keras_lora.models.keras_files import Carrier
from keras_lora.models.quantized import quantization_config, renew_policy_maps

WAYS = ("dequantize", "requantize")
SMALL = 2**16  # size up to which a merged kernel is kept from its check on


class MergedLayer(NamedTuple):
    """A merged layer; error: |kernel - (W + delta)| / |W + delta|."""

    path: str
    layer: object
    error: float


def validate_way(quantized_sites, way):
    """Raises ValueError if `way` is unknown, or missing for quantized kernels."""
    if way is not None and way not in WAYS:
        raise ValueError(
            f"`quantized` must be None, 'dequantize' or 'requantize'. Received: {way!r}"
        )
    if quantized_sites and way is None:
        names = ", ".join(repr(site.name) for site in quantized_sites[:5])
        raise ValueError(
            f"The kernels of {len(quantized_sites)} adapted layers are quantized "
            f"({names}), and no integers represent W + delta exactly. Choose how to "
            "merge: "
            'quantized="dequantize" gives float layers with the dequantized W + delta, '
            'which need the memory of float kernels; quantized="requantize" quantizes '
            "W + delta again, and the report has each layer's error. `export` keeps "
            "the quantized kernels, with A and B as they are."
        )
    if way == "requantize":
        refuse_calibrating("requantize", quantized_sites)


def refuse_calibrating(word, quantized_sites):
    """Raises ValueError where quantizing a kernel again would need calibration data."""
    for site in quantized_sites:
        if site.quantization_mode in quantized_host.CALIBRATED:
            raise ValueError(
                f"{word!r} quantizes kernels again, but the inputs that Keras has "
                f"calibrated {site.name!r} with ({site.quantization_mode!r}) are not "
                'kept. merge_lora(model, quantized="dequantize") makes a float model, '
                "which `Model.quantize` can calibrate again."
            )


def make_merged_layer(layer, kernel, way):
    """Makes a plain layer with this kernel, in float or quantized again."""
    config = classes.view_as(layer, layer.plain_class).get_config()
    config["dtype"] = float_policy(layer).name
    config.pop("quantization_config", None)
    plain = layer.plain_class.from_config(config)
    requantize = way == "requantize"
    owner = layer.path.removesuffix(layer.name)
    with contextlib.ExitStack() as scopes:
        scopes.enter_context(distribution.strategy_scope(layer))
        scopes.enter_context(layer_state.name_scopes(owner))  # layout maps go by paths
        values = {layer.kernel_name: kernel, **layer.other_kernels()}
        if requantize and distribution.is_sharded(layer.frozen_kernel):
            # Keras quantizes on the host.
            values = {name: distribution.fetch(value) for name, value in values.items()}
            scopes.enter_context(distribution.on_host())
        plain.build_from_config(layer.get_build_config())
        for variable in layer_state.kernel_variables(plain).values():
            distribution.assign(variable, values[variable.name])
        if requantize:
            config, mode = quantization_config(layer), layer.quantization_mode
            plain.quantize(mode, config=config, type_check=False)
    return plain


def relative_error(layer, plain):
    """Returns the relative error of a merged kernel, computed in A's dtype."""
    dtype = layer.lora.variable_dtype
    kernel = classes.view_with(plain, type(layer), {}).base_kernel(dtype)
    merged, exact = (
        torch_layout.to_numpy(x).astype("float64")
        for x in (kernel, layer.merged_kernel(dtype))
    )
    return float(np.linalg.norm(merged - exact) / (np.linalg.norm(exact) or 1.0))


def copy_kernel(layer, plain):
    """Gives a layer the kernel, scales and policy of a plain layer of its kind."""
    if plain.quantization_mode is not None:
        variables = layer_state.kernel_variables(layer)
        for name, variable in layer_state.kernel_variables(plain).items():
            distribution.assign(
                variables[name],
                distribution.fetch(variable)
                if distribution.is_sharded(variables[name])
                else variable,
            )
        return
    layer_state.exchange_variables(layer, plain)
    layer.dtype_policy = float_policy(layer)


def float_policy(layer):
    """The policy that the layer had before it was quantized.

    It is made from dtypes: a map of policies loses the names when it is saved.
    """
    compute, variable = layer.compute_dtype, layer.variable_dtype
    return keras.dtype_policies.get(
        compute if compute == variable else f"mixed_{compute}"
    )


def merge_lora(
    model: keras.layers.Layer, quantized: str | None = None
) -> list[MergedLayer]:
    """Merges every adapter into its kernel permanently.

        W <- round(W + scaling * A @ B)

    The sum is formed in float32 and rounded once. The layers become plain Keras
    layers with trainable kernels. The optimizer of a compiled model starts afresh,
    because its variables are different ones.

    Args:
        model: Any Keras model or layer that holds LoRA layers.
        quantized: How to merge into quantized kernels. "dequantize" makes float layers
            with W + delta. "requantize" quantizes W + delta again, as W was. By
            default, quantized kernels are an error, because both ways have a cost.

    Returns:
        A list with .path .layer .error of each quantized layer, where `error` is the
        relative error of the kernel compared with W + delta.

    Raises:
        ValueError: If there is no LoRA layer, A, B or a merged kernel is not finite, a
            kernel is quantized and `quantized` is not given, or the model is inside
            `merged()` or `disabled()`. The model is left unchanged.

    Examples:
        >>> merged_layers = keras_lora.merge_lora(model)
        >>> type(model.layers[0]).__name__
        'Dense'
    """
    adapted = sites.sites_outside_contexts(model)
    quantized_sites = [site for site in adapted if site.is_quantized]
    validate_way(quantized_sites, quantized)
    path_of = sites.Paths(model).path_of if quantized_sites else {}
    report, merged, small = [], {}, {}
    for site in adapted:
        kernel = finite_merged_kernel(site)
        if site.is_quantized:
            merged[site] = plain = make_merged_layer(site, kernel, quantized)
            error = relative_error(site, plain)
            report.append(MergedLayer(path_of[id(site)], site, error))
        elif math.prod(kernel.shape) <= SMALL:
            small[site] = kernel
    for site in adapted:
        if site.is_quantized:
            copy_kernel(site, merged[site])
        else:
            kernel = small.get(site)
            if kernel is None:
                kernel = site.merged_kernel(site.kernel_dtype)
            site.frozen_kernel.assign(kernel)
    _make_plain(model, layer_state.flatten_layers(model))
    return report


def remove_lora(model: keras.layers.Layer):
    """Removes every adapter, so that the model computes with W alone again.

    The layers become plain Keras layers with trainable kernels. Heads and biases that
    trained together with A and B get back their values from before that training.

    Args:
        model: Any Keras model or layer that holds LoRA layers.

    Raises:
        ValueError: If there is no LoRA layer, or inside `merged()` or `disabled()`.

    Examples:
        >>> keras_lora.remove_lora(model)
        >>> type(model.layers[0]).__name__
        'Dense'
    """
    sites.sites_outside_contexts(model)
    model_layers = layer_state.flatten_layers(model)
    training_state.warn_of_variables_without_base(model_layers)
    for layer in model_layers:
        for variable, value in training_state.base_values(layer):
            distribution.assign(variable, value)
    _make_plain(model, model_layers)


def _make_plain(model, model_layers):
    """Turns the LoRA layers of a model into plain ones, and compiles it again."""
    adapted = [layer for layer in model_layers if isinstance(layer, LoRALayer)]
    for layer in adapted:
        sites.make_plain(layer)
    models = compiled.models_sharing_layers(model)
    stay_frozen = shared_with_adapted_models(models, model_layers)
    for layer in adapted:
        if id(layer) in stay_frozen:
            layer.trainable = False
    restore_models(model_layers, stay_frozen)
    renew_policy_maps(model_layers)
    for note in compiled.compile_all_again(models):
        warn_caller(note)


def finite_merged_kernel(site):
    """Returns W + delta in the kernel's dtype; raises if it is not finite."""
    kernel = site.merged_kernel(site.kernel_dtype)
    if not is_finite(kernel):
        refuse_factors_not_finite(site)  # the usual cause
        refuse_not_finite(site, {"the merged kernel": kernel})
    return kernel


def is_finite(values) -> bool:
    values = ops.convert_to_tensor(values)
    here = getattr(values, "is_fully_addressable", True)
    if here and math.prod(values.shape) <= SMALL:  # faster, for each of many
        return bool(np.isfinite(ops.convert_to_numpy(values)).all())
    return bool(ops.all(ops.isfinite(values)))


def refuse_factors_not_finite(site):
    factors = site.lora.named_factors().items()
    refuse_not_finite(site, {name.upper(): factor for name, factor in factors})


def refuse_not_finite(site, arrays):
    for name, values in arrays.items():
        if not is_finite(values):
            raise ValueError(
                f"{name} of layer {site.name!r} holds values that are not finite. "
                "Nothing was merged. Load an earlier adapter, or train with a lower "
                "learning rate."
            )


def shared_with_adapted_models(models, model_layers) -> set:
    """Ids of layers that other adapted models hold too, where W stays frozen.

    Args:
        models: The result of `models_sharing_layers` for a model.
        model_layers: All layers of that model.
    """
    in_model = set(map(id, model_layers))
    return {
        id(layer)
        for other in models
        if id(other) not in in_model
        and training_state.record_of(other).flags
        and sites.adapted_sites(other)
        for layer in layer_state.flatten_layers(other)
    }


def restore_models(model_layers, stay_frozen):
    """Restores classes and flags that `apply_lora` had changed on other layers.

    stay_frozen: Ids of the layers whose W stays frozen.
    """
    for layer in model_layers:
        if isinstance(layer, Carrier) and not any(
            lora_layer.has_adapters(part) for part in layer_state.flatten_layers(layer)
        ):
            classes.change_class(layer, layer.carried_class)
    kept = [layer for layer in model_layers if id(layer) in stay_frozen]
    flags = training_state.trainable_flags(dict(enumerate(kept)))
    for layer in model_layers:
        record = training_state.record_of(layer)
        if record.flags is not None:
            training_state.set_flags(layer, *record.flags)  # of all layers inside too
        if id(layer) not in stay_frozen:
            training_state.set_record(layer, training_state.EMPTY)
    training_state.restore_flags(dict(enumerate(kept)), flags)
