"""The difference of two models as an adapter, as far as its rank allows."""

import dataclasses
from collections.abc import Callable, Mapping

import keras
import numpy as np

from keras_lora.files import save
from keras_lora.files.folder import Adapter
from keras_lora.files.names import modules_of
from keras_lora.keras_internals import distribution, layer_state
from keras_lora.layers import kinds, settings, torch_layout
from keras_lora.layers.substituted import WeightSite
from keras_lora.models import apply, sites, start_values


def extract_adapter(
    base_model: keras.layers.Layer,
    tuned_model: keras.layers.Layer,
    rank: int,
    names: str | Mapping | Callable | None = None,
) -> Adapter:
    """Returns the difference of two models of one architecture as an adapter.

        scaling * A @ B = the nearest matrix of rank r to W_tuned - W_base

    in the Frobenius norm, by singular value decomposition, for every weight that can
    be adapted and differs. Everything else that differs, such as biases and heads, is
    kept in full. A base model that loads the adapter equals the tuned model, up to the
    errors in `.errors` of the result.

    Args:
        base_model: A plain Keras model that is built. It is not changed.
        tuned_model: Another model with the same layers and shapes.
        rank: Whole number > 0; a layer whose kernel is smaller gets its full rank.
        names: As in `save_adapter`.

    Returns:
        An `Adapter`; its `.errors` has |delta - scaling * A @ B| / |delta| by module.

    Raises:
        ValueError: If the models have different layers or shapes, hold adapters (call
            `merge_lora` first), or have equal kernels.

    Examples:
        >>> tuned = keras.models.clone_model(base)
        >>> adapter = keras_lora.extract_adapter(base, tuned, rank=4)
        >>> adapter.config["r"]
        4
    """
    rank = settings.validate_rank(rank)
    for model in (base_model, tuned_model):
        if sites.adapted_sites(model):
            raise ValueError(
                f"{model.name!r} holds LoRA layers. Call merge_lora or remove_lora on "
                "it, or on a copy of it, first."
            )
        for path, layer in sites.layers_by_path(model).items():
            if layer.quantization_mode is not None:
                raise ValueError(
                    f"The layer {path!r} of {model.name!r} is quantized, and integer "
                    "kernels have no low-rank difference. Give the float models."
                )
    paths = sites.Paths(base_model)
    base = modules_of(paths, names)
    tuned = modules_of(sites.Paths(tuned_model), names)
    adapters, updates, trained, errors = {}, {}, [], {}
    kernels = {
        id(kinds.as_site(site).frozen_kernel): module
        for module, site in base.sites.items()
        if site.built and is_of_kind(site) and module not in base.unnamed
    }
    for module, variables in pair_variables(base, tuned).items():
        changed = [(v, other) for v, other in variables if differ(v, other)]
        pairs = {kernels[id(v)]: (v, x) for v, x in changed if id(v) in kernels}
        unadapted = [(v, other) for v, other in changed if id(v) not in kernels]
        able = all(kinds.obstacle(base.sites[name]) is None for name in pairs)
        if not able or {v.name for v, _ in unadapted} - {"bias"}:
            trained += [(module, other) for _, other in variables]  # the whole layer
            continue
        trained += [(module, other) for _, other in unadapted]
        for name, (own, other) in pairs.items():
            delta = torch_layout.to_numpy(other) - torch_layout.to_numpy(own)
            site = base.sites[name]
            matrix = kinds.form_of(site, 1).as_matrix(delta.astype("float64"))
            own_rank = min(rank, *matrix.shape[-2:])
            a, b = start_values.pissa(matrix, own_rank, scaling=1.0)
            errors[name] = float(
                np.linalg.norm(matrix - a @ b) / np.linalg.norm(matrix)
            )
            form = kinds.form_of(site, own_rank)
            updates[name] = a.reshape(form.a_shape), b.reshape(form.b_shape)
            adapters[site] = {"rank": own_rank}
    if not adapters:
        raise ValueError(
            "No kernel that can be adapted differs between the two models."
        )
    with apply.adapt_layers(paths, adapters):
        for module, (a, b) in updates.items():
            lora = base.sites[module].lora
            distribution.assign(lora.a, a)
            distribution.assign(lora.b, b)
        adapter = save.adapter_of(base_model, names, trained)
    return dataclasses.replace(adapter, errors=errors)


def pair_variables(base, tuned):
    """{module: [(variable, the tuned one)]}."""
    if base.keys() != tuned.keys():
        raise ValueError(
            "The two models have different layers: "
            f"{sorted(base.keys() ^ tuned.keys())[:5]} are in only one of them."
        )
    pairs = {}
    for module, layer in base.items():
        both = [layer_state.layer_variables(x) for x in (layer, tuned[module])]
        names = [[(v.name, v.shape) for v in variables] for variables in both]
        if names[0] != names[1]:
            raise ValueError(f"The variables of {module!r} differ in name or shape.")
        pairs[module] = list(zip(*both, strict=True))
    return pairs


def differ(one, two):
    return not np.array_equal(torch_layout.to_numpy(one), torch_layout.to_numpy(two))


def is_of_kind(site):
    """Whether adapter files can name the weight: a known layer's, or one of several."""
    return isinstance(site, WeightSite) or kinds.lora_class_of(type(site)) is not None
