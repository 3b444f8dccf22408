"""Adapters of a model are replaced by others, all together or none of them."""

import contextlib

from keras_lora.keras_internals.compiled import bring_weights_back
from keras_lora.keras_internals.layers import attach
from keras_lora.keras_internals.layers import detach
from keras_lora.keras_internals.layers import flatten_layers
from keras_lora.keras_internals.layers import name_scope_of
from keras_lora.keras_internals.layers import refresh_torch_parameters
from keras_lora.layers.methods import make_adapter


@contextlib.contextmanager
def renewed(model, options):
    """The adapters are others inside, and stay so; if anything fails, they were not.

    Args:
        model: A Keras model.
        options: LoRA layer -> the arguments of its new adapter.
    """
    bring_weights_back(model)
    made = {x: make_adapter(o, x.variable_dtype) for x, o in options.items()}
    with contextlib.ExitStack() as undo:
        undo.callback(refresh_torch_parameters, flatten_layers(model))
        for layer, adapter in made.items():
            undo.callback(put, layer, layer.lora)
            put(layer, adapter)
            with name_scope_of(layer):
                layer.build_factors()
        yield
        undo.pop_all()


def put(layer, adapter):
    detach(layer, "lora")
    attach(layer, "lora", adapter)
