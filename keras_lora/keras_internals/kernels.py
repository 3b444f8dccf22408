"""The variables of a layer's kernel, and others in their place."""

import contextlib

import keras

from keras_lora.keras_internals.layers import unlocked


def kernel_variables(layer) -> dict:
    """Attribute -> variable of a layer itself, all but its bias.

    Those of a layer that is quantized: its integers, scales, zeros and groups.
    """
    return {
        name: value
        for name, value in vars(layer).items()
        if isinstance(value, keras.Variable) and name != "bias"
    }


def exchange_variables(layer, other):
    """Gives a quantized layer the kernels of a float one like it."""
    with unlocked(layer):
        for name in kernel_variables(layer):
            delattr(layer, name)
        for name, variable in kernel_variables(other).items():
            setattr(layer, name, variable)
    order = [variable.name for variable in other._trainable_variables]
    layer._trainable_variables.sort(key=lambda variable: order.index(variable.name))
    layer._is_quantized = False
    layer.quantization_config = None


def drop_float_kernel(layer):
    """Ends Keras's calibration: the integers alone are left of a kernel."""
    variables = kernel_variables(layer).items()
    with unlocked(layer):
        for name in [
            x for x, v in variables if v.name == "kernel" and "int" not in v.dtype
        ]:
            delattr(layer, name)
        if hasattr(layer, "calibration_pending"):  # since Keras 3.16
            layer.calibration_pending = False
        else:
            setattr(layer, f"is_{layer.quantization_mode}_calibrated", True)


@contextlib.contextmanager
def listed_instead(layer, old, new):
    """Makes a layer list another variable among its weights, for a while."""
    lists = (layer._trainable_variables, layer._non_trainable_variables)
    tracked = next(x for x in lists if any(v is old for v in x))
    replace(tracked, old, new)
    try:
        yield
    finally:
        replace(tracked, new, old)


def replace(tracked, old, new):
    place = next(index for index, v in enumerate(tracked) if v is old)
    list.__setitem__(tracked, place, new)


@contextlib.contextmanager
def unlisted(layer, sublayer):
    """A layer does not list one of the layers that it holds."""
    place = next(n for n, inner in enumerate(layer._layers) if inner is sublayer)
    list.pop(layer._layers, place)
    try:
        yield
    finally:
        list.insert(layer._layers, place, sublayer)
