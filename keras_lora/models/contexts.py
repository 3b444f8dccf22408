"""The model with its adapters merged, or without them, for a while."""

import contextlib

from keras import ops

from keras_lora.keras_internals.hidden_state import hold_resource
from keras_lora.keras_internals.hidden_state import release_resource
from keras_lora.keras_internals.layers import flatten_layers
from keras_lora.keras_internals.tracing import refusing_to_train
from keras_lora.keras_internals.tracing import take_compiled_functions
from keras_lora.layers.adapter import FixedKernel
from keras_lora.layers.trained_values import written_as
from keras_lora.models.adapt import built_lora_layers
from keras_lora.models.adapt import checked_lora_layers
from keras_lora.models.merge import checked_merged_kernel
from keras_lora.models.merge import kernel_variable
from keras_lora.models.merge import refuse_factors_not_finite
from keras_lora.models.record import base_values

UNTRAINED = (
    "Adapters do not train inside `{}(model)`, where they stand still. Leave the "
    "context first."
)


def merged(model):
    """Context in which every adapter is merged: calls cost what plain layers cost.

    W is not touched: W + delta stands beside it, and is dropped at the end. Meant
    for inference: `fit` and `train_on_batch` are refused inside. A model that is
    saved inside is saved with its W, A and B. Inside, `disabled` gives the base
    model, and the merged one back. Both are the model's, not a thread's: every
    thread that calls it meanwhile sees the same.

    Examples:
        >>> with keras_lora.merged(model):
        ...     predictions = model.predict(x, verbose=0)

    Args:
        model: Any Keras model or layer that holds LoRA layers.

    Raises:
        ValueError: If there is no LoRA layer, a kernel is quantized, A, B or the sum
            is not finite, or inside `merged` or `disabled`.
    """
    layers = checked_lora_layers(model)
    for layer in layers:
        if layer.is_quantized:
            raise ValueError(
                f"The kernel of {layer.name!r} is quantized: what stands for W + delta "
                "would be a float kernel, with other outputs than the model's and the "
                "memory that was saved. Call the model as it is, or merge for good: "
                'merge_lora(model, quantized="dequantize").'
            )
        refuse_factors_not_finite(layer)
    return _standing_in(model)


@contextlib.contextmanager
def _standing_in(model):
    layers = checked_lora_layers(model)  # as they are at entry
    stand_ins = [
        FixedKernel(kernel_variable(layer, checked_merged_kernel(layer)))
        for layer in layers
    ]
    functions = take_compiled_functions(flatten_layers(model))
    before = [layer.stand_in for layer in layers]
    try:
        set_stand_ins(layers, stand_ins)
        with refusing_to_train(model, UNTRAINED.format("merged")):
            yield model
    finally:
        set_stand_ins(layers, before)
        take_compiled_functions(flatten_layers(model))
        for owner, name, function in functions:
            setattr(owner, name, function)


def set_stand_ins(layers, stand_ins):
    for layer, stand_in in zip(layers, stand_ins, strict=True):
        layer.stand_in = stand_in
        if stand_in is None:
            release_resource(layer, "stand_in")
        else:
            hold_resource(layer, "stand_in", stand_in.kernel)


def disabled(model):
    """Context in which the adapters are switched off: the base model.

    Heads and biases that trained beside A and B have, inside, the values that they
    had before training; files and copies that are made inside have what was trained.
    It holds wherever the layers are called, in functions that were traced before too:
    they read the scaling, which is 0 inside. A call costs what it costs with adapters.
    `fit` and `train_on_batch` of the model are refused. Contexts nest, and are the
    model's, not a thread's.

    Args:
        model: Any Keras model or layer that holds LoRA layers.

    Raises:
        ValueError: If there is no LoRA layer.
    """
    built_lora_layers(model)
    return _switched_off(model)


@contextlib.contextmanager
def _switched_off(model):
    layers = [layer for layer in built_lora_layers(model) if layer.lora.is_on]
    values = [pair for layer in flatten_layers(model) for pair in base_values(layer)]
    stand_ins = [layer.stand_in for layer in layers]
    kernels = [
        (stand_in.kernel, layer.frozen_kernel)
        for stand_in, layer in zip(stand_ins, layers, strict=True)
        if stand_in is not None
    ]
    # The stand-ins' kernels are no larger than what `merged` has made already.
    trained, stood_in = (
        [(variable, ops.copy(variable)) for variable, _ in pairs]
        for pairs in (values, kernels)
    )
    try:
        for layer in layers:
            layer.lora.switch(on=False)
        assign_all(values + kernels)
        refusing = refusing_to_train(model, UNTRAINED.format("disabled"))
        with refusing, written_as(trained):
            yield
    finally:
        for layer in layers:
            layer.lora.switch(on=True)
        assign_all(trained + stood_in)


def assign_all(values):
    for variable, value in values:
        variable.assign(value)
