"""Turns a Keras layer into a LoRA layer, and back, in place on the same object."""

import functools

from keras_lora.keras_internals import classes, layers
from keras_lora.layers import kinds, lora_layer, methods
from keras_lora.layers.adapter import LowRankAdapter
from keras_lora.layers.lora_layer import LoRALayer


def new_adapter(site, options) -> LowRankAdapter:
    """Creates the adapter of a site: in its dtype, without dropout if it takes none."""
    if not kinds.takes_dropout(site):
        options = {**options, "dropout": 0.0}
    name = getattr(site, "adapter_attribute", "lora")
    return methods.make_adapter(options, site.variable_dtype, name)


def adapt(site, adapter):
    """Gives a site an adapter; the site's layer becomes a LoRA layer."""
    layer = kinds.layer_of(site)
    if not isinstance(layer, LoRALayer):
        classes.change_class(layer, kinds.adapting_class(layer))
    site.attach_adapter(adapter)
    with layers.name_scope_of(layer):
        site.build_adapter()


def make_plain(layer):
    """Turns a LoRA layer into the Keras layer that it extends, with W as kernel."""
    for site in reversed(layer.sites().values()):
        lora = site.lora
        lora.switch(on=False)  # for functions that still hold the adapter
        site.detach_adapter()
        site.release_kernel(lora.kernel_place)
    for name in own_attributes(type(layer)) & vars(layer).keys():
        delattr(layer, name)
    classes.change_class(layer, layer.plain_class)


@functools.cache
def own_attributes(lora_class) -> set:
    """Names of attributes with a default in a LoRA class but not in its Keras class."""
    return {
        name
        for cls in lora_class.__mro__
        if issubclass(cls, LoRALayer)
        for name, default in vars(cls).items()
        if not (name.startswith("__") or callable(default) or hasattr(default, "fget"))
    }


def refuse_unbuilt(model):
    """Raises ValueError for a model without weights."""
    if not model.built and not model.weights:
        raise ValueError(
            f"The model {model.name!r} is not built yet: its layers have no kernels. "
            "Call it once, or `model.build(input_shape)`, first."
        )


def refuse_adapters(paths):
    """Raises if a layer of a model has an adapter already, or is in a bank."""
    for path, layer in paths.items():
        if lora_layer.has_adapters(layer):
            lora = next(iter(layer.loras.values()))
            raise ValueError(
                f"The layer {path!r} has an adapter. Call {lora.removal_hint} first."
            )
