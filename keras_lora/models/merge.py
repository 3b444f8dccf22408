"""From LoRA layers back to plain Keras layers, in place, on the same objects."""

import contextlib

import keras
from keras import ops

from keras_lora.keras_internals.calls import warn_caller
from keras_lora.keras_internals.classes import change_class
from keras_lora.keras_internals.compiled import compile_all_again
from keras_lora.keras_internals.kernels import replace_kernel
from keras_lora.keras_internals.layers import attach
from keras_lora.keras_internals.layers import detach
from keras_lora.keras_internals.layers import flatten_layers
from keras_lora.keras_internals.layers import refresh_torch_parameters
from keras_lora.keras_internals.models_around import holders
from keras_lora.layers.lora_layer import LoRALayer
from keras_lora.layers.lora_layer import is_adapted
from keras_lora.layers.quantized_host import without_gradients
from keras_lora.models.adapt import checked_lora_layers
from keras_lora.models.adapt import lora_layers
from keras_lora.models.adapt import make_plain
from keras_lora.models.keras_files import Adapted
from keras_lora.models.merge_quantized import MergedLayer
from keras_lora.models.merge_quantized import checked_way
from keras_lora.models.merge_quantized import merged_plain
from keras_lora.models.merge_quantized import relative_error
from keras_lora.models.merge_quantized import take_over
from keras_lora.models.paths import layer_paths
from keras_lora.models.paths import with_model
from keras_lora.models.quantized import renew_policy_maps
from keras_lora.models.record import NOTHING
from keras_lora.models.record import base_values
from keras_lora.models.record import record_of
from keras_lora.models.record import set_record
from keras_lora.models.record import warn_of_unremembered
from keras_lora.models.trainable_flags import set_flags
from keras_lora.models.trainable_flags import trainable_state


def merge_lora(model, quantized: str | None = None) -> list[MergedLayer]:
    """Merges every adapter into its kernel, for good.

        W <- round(W + scaling * A @ B)

    The sum is formed in float32 and rounded once. The layers are plain Keras
    layers again, whose kernels train; the optimizer of a compiled model starts
    anew, as its variables are others.

    Args:
        model: Any Keras model or layer that holds LoRA layers.
        quantized: What to make of layers whose kernel is quantized. "dequantize":
            float layers with W + delta. "requantize": W + delta quantized anew, as W
            was. The default is an error, as each has its price.

    Returns:
        For the quantized layers, rows of .path .layer .error, the relative error of
        the kernel to W + delta.

    Raises:
        ValueError: If there is no LoRA layer, if A, B or a merged kernel is not
            finite, a kernel is quantized and `quantized` does not say what to do, or
            inside `merged()` or `disabled()`. The model is then as before.
    """
    layers = checked_lora_layers(model)
    hosts = [layer for layer in layers if layer.is_quantized]
    checked_way(hosts, quantized)
    paths = layer_paths(model)
    path_of = {id(layer): path for path, layer in paths.items()}
    report, made = [], {}
    for layer in layers:
        kernel = checked_merged_kernel(layer)
        if layer.is_quantized:
            made[layer] = plain = merged_plain(layer, kernel, quantized)
            error = relative_error(layer, plain)
            report.append(MergedLayer(path_of[id(layer)], layer, error))
    for layer in layers:
        if layer.is_quantized:
            take_over(layer, made[layer])
        else:
            layer.frozen_kernel.assign(layer.merged_kernel(layer.kernel_dtype))
    _make_plain(model, [*with_model(model, paths).values()])
    return report


def remove_lora(model):
    """Drops every adapter: the model is the one that W alone makes.

    The layers are plain Keras layers again, whose kernels train. What trained beside
    A and B, heads and biases, has the values again that it had when that began.

    Args:
        model: Any Keras model or layer that holds LoRA layers.

    Raises:
        ValueError: If there is no LoRA layer, or inside `merged()` or `disabled()`.
    """
    checked_lora_layers(model)
    layers = flatten_layers(model)
    warn_of_unremembered(layers)
    for layer in layers:
        for variable, value in base_values(layer):
            variable.assign(value)
    _make_plain(model, layers)


def _make_plain(model, layers):
    """layers: all of the model's."""
    adapted = [layer for layer in layers if isinstance(layer, LoRALayer)]
    for layer in adapted:
        make_plain(layer)
    found = holders(model)
    held = held_by_adapted(found, layers)
    for layer in adapted:
        if id(layer) in held:
            layer.trainable = False
    restore_models(layers, held)
    renew_policy_maps(layers)
    for note in compile_all_again(found):
        warn_caller(note)


@contextlib.contextmanager
def merged_meanwhile(model):
    """The model with plain layers of merged kernels inside, and as it was outside.

    W itself is not written: another variable stands in its place meanwhile.
    """
    undo = contextlib.ExitStack()
    with undo:
        for layer in checked_lora_layers(model):
            if layer.is_quantized:  # stays as it is, with A and B beside W
                checked_merged_kernel(layer)
                continue
            kernel = kernel_variable(
                layer, checked_merged_kernel(layer), layer._kernel_place.autocast
            )
            old = replace_kernel(layer, layer.kernel_name, kernel)
            undo.callback(replace_kernel, layer, layer.kernel_name, old)
            undo.callback(attach, layer, "lora", layer.lora)
            detach(layer, "lora")
            undo.callback(change_class, layer, type(layer))
            change_class(layer, layer.plain_class)
        refresh_torch_parameters(flatten_layers(model))
        undo.enter_context(without_gradients())
        yield model
    refresh_torch_parameters(flatten_layers(model))


def kernel_variable(layer, values, autocast=False):
    """A variable that can stand in for the layer's kernel."""
    return keras.Variable(
        values,
        dtype=layer.frozen_kernel.dtype,
        trainable=False,
        autocast=autocast,
        name=layer.kernel_name,
    )


def checked_merged_kernel(layer):
    """W + delta in the kernel's dtype, which must be finite."""
    refuse_factors_not_finite(layer)
    kernel = layer.merged_kernel(layer.kernel_dtype)
    refuse_not_finite(layer, {"the merged kernel": kernel})
    return kernel


def refuse_factors_not_finite(layer):
    factors = layer.lora.named_factors().items()
    refuse_not_finite(layer, {name.upper(): factor for name, factor in factors})


def refuse_not_finite(layer, arrays):
    for name, values in arrays.items():
        if not bool(ops.all(ops.isfinite(values))):
            raise ValueError(
                f"{name} of layer {layer.name!r} holds values that are not finite. "
                "Nothing was merged. Load an earlier adapter, or train with a lower "
                "learning rate."
            )


def held_by_adapted(found, layers) -> set:
    """Ids of layers of other models that have adapters still: there W stays frozen.

    Args:
        found: What `holders` gives for a model.
        layers: All of that model's own.
    """
    own = set(map(id, layers))
    return {
        id(layer)
        for other in found
        if id(other) not in own and record_of(other).before and lora_layers(other)
        for layer in flatten_layers(other)
    }


def restore_models(layers, held):
    """What `apply_lora` had changed beside the adapted layers: classes and flags.

    held: Ids of those that stay frozen.
    """
    for layer in layers:
        if isinstance(layer, Adapted) and not any(
            is_adapted(part) for part in flatten_layers(layer)
        ):
            change_class(layer, layer.plain_owner)
    kept = [layer for layer in layers if id(layer) in held]
    flags = list(trainable_state(dict(enumerate(kept))).values())
    for layer in layers:
        record = record_of(layer)
        if record.before is not None:
            set_flags(layer, *record.before)  # and of all inside
        if id(layer) not in held:
            set_record(layer, NOTHING)
    for layer, own in zip(kept, flags, strict=True):
        set_flags(layer, *own)
