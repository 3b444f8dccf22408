"""The model with its adapters folded, or without them, for a while."""

import contextlib
import types

from keras_lora.keras_internals import take_compiled_functions
from keras_lora.models.adapt import checked_lora_layers
from keras_lora.models.merge import checked_merged_kernel
from keras_lora.models.merge import kernel_variable


def merged(model):
    """Context in which every adapter is folded: calls cost what plain layers cost.

    W is not touched: W + delta stands beside it, and is dropped at the end. Meant
    for inference; the adapters do not train inside. A model that is saved inside
    is saved with its W, A and B.

    Example:

    >>> with keras_lora.merged(model):
    ...     predictions = model.predict(x)

    Args:
        model: Any Keras model or layer that holds LoRA layers.

    Raises:
        ValueError: If there is no LoRA layer, or A, B or the sum is not finite.
    """
    kernels = [
        (layer, kernel_variable(layer, checked_merged_kernel(layer)))
        for layer in checked_lora_layers(model)
    ]
    return _fixed_kernels(model, kernels)


def disabled(model):
    """Context in which the adapters are switched off: the base model.

    Functions that were traced around the model outside, other than its own
    train, test and predict functions, do not see it.

    Args:
        model: Any Keras model or layer that holds LoRA layers.

    Raises:
        ValueError: If there is no LoRA layer.
    """
    kernels = [(layer, layer.frozen_kernel) for layer in checked_lora_layers(model)]
    return _fixed_kernels(model, kernels)


@contextlib.contextmanager
def _fixed_kernels(model, kernels):
    functions = take_compiled_functions(model)
    try:
        for layer, kernel in kernels:
            # In a namespace, or Keras would track it as a weight of the layer.
            layer._fixed_kernel = types.SimpleNamespace(kernel=kernel)
        yield model
    finally:
        for layer, _ in kernels:
            layer._fixed_kernel = None
        take_compiled_functions(model)
        for owner, name, function in functions:
            setattr(owner, name, function)
