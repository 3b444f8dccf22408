"""The sites of a model: the weights that have adapters, and those that can."""

from keras_lora.keras_internals import processes
from keras_lora.keras_internals.compiled import bring_weights_back
from keras_lora.keras_internals.layers import flatten_layers
from keras_lora.layers.kinds import sites_of
from keras_lora.layers.lora_layer import LoRALayer


def site_paths(paths) -> dict:
    """Path -> site, for all weights that can have an adapter, in the model's order.

    A layer with one kernel is a site under its own path. The weights of others have
    their names beside it, and those of a cell stand under the layer that runs it.

    paths: path -> layer.
    """
    found, of_cells = {}, set()
    for path, layer in paths.items():
        if id(layer) in of_cells:
            continue
        for weight, site in sites_of(layer).items():
            if site is layer:
                found[path] = layer
            else:
                found[f"{path}/{weight}" if path else weight] = site
                if site.kernel_owner() is not layer:
                    of_cells.add(id(site.kernel_owner()))
    return found


def adapted_sites(model) -> list:
    """The sites of a model that have an adapter, each once."""
    layers = [x for x in flatten_layers(model) if isinstance(x, LoRALayer)]
    return [site for layer in layers for site in layer.sites().values()]


def refuse_banked(site, path):
    """Raises ValueError for a layer whose adapters are a bank's."""
    if site.lora.is_bank:
        raise ValueError(
            f"The layer {path!r} holds the adapters of an AdapterBank, and only the "
            f"bank may change them. Call {site.lora.taken_off_by} first."
        )


def built_sites(model):
    """The sites of a model that have adapters: one at least, and all built."""
    bring_weights_back(model)
    processes.meet(model)
    sites = adapted_sites(model)
    if not sites:
        raise ValueError(
            f"{getattr(model, 'name', model)!r} holds no LoRA layer with an adapter "
            "(rank > 0). Call `apply_lora` or `load_adapter` first; `merge_lora` and "
            "`remove_lora` take adapters away, so save them before."
        )
    for site in sites:
        refuse_banked(site, site.name)
        if not site.lora.built:
            raise ValueError(
                f"The LoRA layer {site.name!r} is not built yet. Build the model "
                "first, for example with `model.build(input_shape)`, or call it once."
            )
    return sites


def checked_sites(model):
    """The same, none of them inside `merged()` or `disabled()`."""
    sites = built_sites(model)
    for site in sites:
        if site.lora.stand_in is not None or not site.lora.is_on:
            raise ValueError(
                f"The adapter of {site.name!r} is inside `merged()` or `disabled()`. "
                "Leave that context first."
            )
    return sites
