"""Adapters of a model are replaced by others, all together or none of them."""

import contextlib

from keras_lora.keras_internals.compiled import bring_weights_back
from keras_lora.keras_internals.distribution import own_strategy
from keras_lora.keras_internals.layers import flatten_layers
from keras_lora.keras_internals.layers import name_scope_of
from keras_lora.keras_internals.layers import refresh_torch_parameters
from keras_lora.layers.methods import make_adapter


@contextlib.contextmanager
def renewed(model, options):
    """Replaces adapters; if anything fails inside, the old ones are put back.

    Args:
        model: A Keras model.
        options: Site -> the arguments of its new adapter.
    """
    bring_weights_back(model)
    with own_strategy(model):
        yield from all_or_none(model, options)


def all_or_none(model, options):
    made = {
        site: make_adapter(own, site.variable_dtype, site.adapter_attribute)
        for site, own in options.items()
    }
    with contextlib.ExitStack() as undo:
        undo.callback(refresh_torch_parameters, flatten_layers(model))
        for site, adapter in made.items():
            undo.callback(put, site, site.lora)
            put(site, adapter)
            with name_scope_of(site.lora_layer()):
                site.build_factors()
        yield
        undo.pop_all()


def put(site, adapter):
    adapter.kernel_place = site.lora.kernel_place
    site.detach_adapter()
    site.attach_adapter(adapter)
