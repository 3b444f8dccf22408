"""Converts a layer's adapter to PEFT's tensors, and back.

PEFT uses the layout of torch: (out, in) for a linear layer, (out, in, *k) for a
convolution. Suffixes follow the module's name in a file.

    layer           A here             lora_A there     B here        lora_B there
    Dense           (in, r)            (r, in)          (r, out)      (out, r)
    EinsumDense     (contracted, r)    (r, in)          (r, new)      (out, r)
    MergedDense     (in, G*r)          (G*r, in)        (G, r, n)     (out, G*r) in blocks
    Embedding       (vocab, r)         (r, vocab)       (r, dim)      (dim, r)
    Conv            (*k, in, r)        (r, in, *k)      (r, out)      (out, r, 1...)
"""  # noqa: E501

import numpy as np

from keras_lora.files import slices
from keras_lora.keras_internals import layer_state
from keras_lora.layers import kinds, saved_values, torch_layout


def to_tensors(site):
    """Suffix -> the layer's factors in PEFT's layout, contiguous."""
    return site.lora.to_file(kinds.kind_of(site).file_suffixes)


def from_tensors(site, arrays, where):
    """Returns [(variable, value)] of the factors from a file's arrays.

    Raises ValueError if a shape does not fit.
    """
    expected = to_tensors(site)
    if arrays.keys() != expected.keys():
        raise ValueError(
            f"{where!r} is a {type(site).__name__}, which needs {sorted(expected)}; "
            f"the file has {sorted(arrays)}."
        )
    for suffix, array in arrays.items():
        if array.shape != expected[suffix].shape:
            raise ValueError(
                f"{suffix[1:]} of {where!r} has shape {array.shape} in the file; the "
                f"layer needs {expected[suffix].shape}.{site.form.file_note}"
            )
    try:
        values = site.lora.from_file(arrays, kinds.kind_of(site).file_suffixes)
    except ValueError as error:
        raise ValueError(f"The adapter of {where!r}: {error}") from error
    factors = site.lora.named_factors()
    return [(factors[name], value) for name, value in values.items()]


# Keras's name for a variable of a layer -> torch's.
TORCH_NAMES = {
    "kernel": "weight",
    "embeddings": "weight",
    "position_embeddings": "weight",
    "gamma": "weight",
    "scale": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


def torch_name(layer, variable):
    if variable.name == kinds.kind_of(layer).kernel_name:
        return "weight"
    return TORCH_NAMES.get(variable.name, variable.name)


def weight_key(module, name, adapted):
    """The key of a weight that trained in full; PEFT wraps the adapted modules."""
    return f"{module}.base_layer.{name}" if module in adapted else f"{module}.{name}"


def weight_to_tensor(layer, variable, inputs_first=False):
    """Returns the value of a variable that trained in full, with torch's axes.

    inputs_first: whether the module keeps (in, out), as with `fan_in_fan_out`.
    """
    value = torch_layout.to_numpy(saved_values.trained_value(variable))
    if variable.name == "bias":
        return value.reshape(-1)
    kind = kinds.kind_of(layer)
    if variable.name == kind.kernel_name:
        value = kind.weight_to_file(layer, value, inputs_first)
    return np.ascontiguousarray(value)


def kernel_to_tensor(layer):
    """The kernel of a layer, plain or adapted, as (outputs, inputs)."""
    return weight_to_tensor(layer, getattr(layer, kinds.kind_of(layer).kernel_name))


def weight_from_tensor(layer, variable, value, where, inputs_first=False):
    """Returns the value of a variable for a file's tensor, with Keras's axes.

    Raises ValueError if the shape does not fit.
    """
    expected = weight_to_tensor(layer, variable, inputs_first).shape
    if value.shape != expected:
        raise ValueError(
            f"The tensor {where!r} has shape {value.shape}; the model needs {expected}."
        )
    kind = kinds.kind_of(layer)
    if variable.name == kind.kernel_name:
        value = kind.weight_from_file(layer, value, inputs_first)
    return value.reshape(variable.shape)


def fuse_weights(values, modules):
    """Joins biases and weights of slices to those of their modules, in place."""
    for module, layout in slices.layouts(modules, modules.regions).items():
        names = layout.names
        for weight in {name for part, name in values if part in names}:
            missing = [name for name in names if name not in modules]
            if missing:
                raise ValueError(
                    f"Only part of the {weight} of {module!r} trains: `names` has no "
                    f"layer for {missing}."
                )
            untrained = {
                name: weight_to_tensor(
                    modules[name], variable, name in modules.inputs_first
                )
                for name in names
                for variable in layer_state.layer_variables(modules[name])
                if torch_name(modules[name], variable) == weight
            }
            parts = {
                name: values.pop((name, weight), untrained[name]) for name in names
            }
            first = parts[names[0]]
            axis = slices.outputs_axis(first, names[0] in modules.inputs_first)
            sizes = sum(part.shape[axis] for part in parts.values())
            if sizes != layout.total(first.shape[axis]):
                raise ValueError(
                    f"The {weight} of {module!r} trains, but the model has only part "
                    "of it."
                )
            value = layout.gather(parts, axis)
            if value.ndim > 1:
                value = layout.order_inputs(value, 1 - axis)
            values[module, weight] = value


def split_weights(file):
    """Splits biases and weights of fused modules into those of slices, in place."""
    for module, layout in slices.layouts(file.modules, file.modules.regions).items():
        for key in [key for key in file.weights if key.startswith(f"{module}.")]:
            value = file.weights.pop(key)
            name = key.split(".")[-1]
            if key.endswith(".base_layer.weight"):
                continue  # PEFT repeats a targeted head
            axis = slices.outputs_axis(value, file.config["fan_in_fan_out"])
            if not layout.fits(value, axis):
                raise ValueError(
                    f"The tensor {key!r} has shape {value.shape}, which does not "
                    f"divide into {len(layout.names)} slices."
                )
            if value.ndim > 1:
                value = layout.order_inputs(value, 1 - axis, inverse=True)
            for part, values in layout.scatter(value, axis).items():
                file.weights[weight_key(part, name, file.factors)] = values
