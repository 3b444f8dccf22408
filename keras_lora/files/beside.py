"""What trained beside A and B, as files hold it."""

import itertools

from keras_lora.files.slices import fused_modules
from keras_lora.files.slices import inputs_in_order
from keras_lora.files.slices import joined
from keras_lora.files.slices import outputs_axis
from keras_lora.files.slices import slices_of
from keras_lora.files.slices import total_of
from keras_lora.files.tensors import torch_name
from keras_lora.files.tensors import weight_to_tensor
from keras_lora.keras_internals.layers import layer_state
from keras_lora.layers.adapter import LowRankAdapter
from keras_lora.models.record import beside


def trained_beside(modules, adapters):
    """(module, variable) that train beside the factors, heads with all they have."""
    trained = []
    for module, layer in modules.items():
        if isinstance(layer, LowRankAdapter):
            continue
        found = beside(layer)
        if module not in adapters and {torch_name(layer, v) for v in found} - {"bias"}:
            known = set(map(id, found))
            found += [v for v in layer_state(layer)[1] if id(v) not in known]
        trained += [(module, variable) for variable in found]
    return trained


def fuse_others(others, modules):
    """Biases and weights of slices become their module's, in place."""
    for module, count in fused_modules(modules).items():
        names = slices_of(module, count)
        for weight in {name for slot, name in others if slot in names}:
            missing = [name for name in names if name not in modules]
            if missing:
                raise ValueError(
                    f"The {weight} of {module!r} trains in part: `names` has no layer "
                    f"for {missing}."
                )
            untrained = {
                name: weight_to_tensor(
                    modules[name], variable, name in modules.inputs_first
                )
                for name in names
                for variable in itertools.chain(*layer_state(modules[name]))
                if torch_name(modules[name], variable) == weight
            }
            parts = {
                name: others.pop((name, weight), untrained[name]) for name in names
            }
            first = parts[names[0]]
            axis = outputs_axis(first, names[0] in modules.inputs_first)
            total = total_of(names, first.shape[axis], modules.places)
            if sum(part.shape[axis] for part in parts.values()) != total:
                raise ValueError(
                    f"The {weight} of {module!r} trains, of which the model has only a "
                    "part."
                )
            value = joined(parts, total, modules.places, axis)
            if value.ndim > 1:
                value = inputs_in_order(value, names, modules.places, 1 - axis)
            others[module, weight] = value
