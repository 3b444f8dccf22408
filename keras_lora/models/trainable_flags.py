"""The trainable flags of a whole model, to put back later or elsewhere."""

from keras_lora.keras_internals.layers import keep_frozen
from keras_lora.keras_internals.layers import own_variables


def trainable_state(layers) -> dict:
    """{path: [layer.trainable, one flag per variable of its own]}.

    layers: path -> layer, those that hold others first.
    """
    return {
        path: [layer.trainable, [v.trainable for v in own_variables(layer)]]
        for path, layer in layers.items()
    }


def restore_trainable_state(layers, state):
    """Layers that came or went since, a tokenizer's for example, are passed over.

    In a copy that calls its layers by other names, those with variables are counted
    instead.
    """
    holders = {path: flags for path, flags in state.items() if flags[1]}
    if holders.keys() <= layers.keys():
        state = {path: flags for path, flags in state.items() if path in layers}
    else:
        own = [path for path, layer in layers.items() if own_variables(layer)]
        state = dict(zip(own, holders.values(), strict=True))
    # From the outside in: what is set on a layer reaches the layers inside it.
    for path, (trainable, flags) in state.items():
        set_flags(layers[path], trainable, flags)


def set_flags(layer, trainable, flags):
    keep_frozen(layer)
    layer.trainable = trainable
    variables = own_variables(layer)
    # A kernel that was quantized since, or is float again, stands first.
    flags = ([trainable] * len(variables) + flags)[len(flags) :]
    for variable, flag in zip(variables, flags, strict=True):
        variable.trainable = flag
