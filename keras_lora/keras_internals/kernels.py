"""The variables of a layer's kernel, and others in their place."""

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


def replace_kernel(layer, kernel_name, variable):
    """Puts another variable in the place of the layer's kernel, list and all."""
    old = getattr(layer, kernel_name)
    # Keras's own layers hold it in `_kernel`, behind a property.
    attribute = next(
        name
        for name in (kernel_name, f"_{kernel_name}")
        if vars(layer).get(name) is old
    )
    for tracked in (layer._trainable_variables, layer._non_trainable_variables):
        place = [index for index, v in enumerate(tracked) if v is old]
        if place:
            layer._untrack_variable(old)
            with unlocked(layer):
                setattr(layer, attribute, variable)
            tracked.insert(place[0], tracked.pop())
            return old
    raise AssertionError("a kernel is tracked by its layer")
