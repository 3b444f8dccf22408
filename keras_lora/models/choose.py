"""Which weights of a model get an adapter, and why others do not."""

import collections
import re

import keras

from keras_lora.keras_internals import calls, layer_state, warn_caller
from keras_lora.layers import kinds
from keras_lora.layers.adapter import LowRankAdapter
from keras_lora.models import tables, targets

WHOLE_MODEL = ("all-linear", "all")


def choose(paths, target, exclude, trained):
    """Returns path -> site to adapt, path -> reason to skip, and notes.

    Args:
        paths: The `Paths` of a model.
        target: As in `apply_lora`.
        exclude: As in `apply_lora`.
        trained: Paths of layers that train in full.
    """
    inside_trained = tuple(f"{path}/" for path in trained)
    candidates = {
        path: site
        for path, site in paths.sites.items()
        if path not in trained and not path.startswith(inside_trained)
    }
    everything = isinstance(target, str) and target in WHOLE_MODEL
    if everything:
        paths_meant, skipped = paths_of_whole_model(paths.model, candidates, target)
        for path, layer in paths.with_model.items():
            if not f"{path}/".startswith(inside_trained):
                for weight, why in kinds.out_of_reach(layer).items():
                    skipped[f"{path}/{weight}".lstrip("/")] = why
    else:
        skipped = {}
        paths_meant = paths_of_rule(paths, candidates, target, trained)
    if exclude is not None:
        layers_and_sites = {**paths.sites, **paths.layers}
        left_out = targets.matching_paths(exclude, layers_and_sites, "exclude")
        excluded = {x for p in left_out for x in (p, *paths.sites_of.get(p, ()))}
        if paths_meant and excluded.issuperset(paths_meant):
            raise ValueError(
                f"`exclude` {exclude!r} leaves nothing of `target` {target!r}."
            )
        paths_meant = [path for path in paths_meant if path not in excluded]
        skipped = {p: why for p, why in skipped.items() if p not in excluded}
    by_name = isinstance(target, (list, tuple, set, frozenset))
    chosen, holders = {}, paths_of_weights(paths.sites)
    for path in paths_meant:
        site, layer = candidates[path], kinds.layer_of(candidates[path])
        owner = owner_of(paths, path, layer)
        reason = (
            kinds.obstacle(site)
            or reassignment_reason(owner)
            or sharing_reason(path, site, holders)
        )
        if reason and by_name and layer.built:
            raise ValueError(
                f"The layer {path!r} cannot be adapted: {reason} Leave it out with "
                "exclude=."
            )
        no_effect = no_effect_in(owner, layer)
        if reason or (everything and no_effect):
            skipped[path] = reason or no_effect
        else:
            chosen[path] = site
            if no_effect:
                warn_caller(f"{path!r}: {no_effect}")
    warn_of_axes(map(kinds.layer_of, chosen.values()))
    if not chosen:
        raise ValueError(no_match_message(target, skipped))
    notes = notes_on_outputs(paths.model, candidates, chosen) if everything else []
    return chosen, skipped, notes


def paths_of_whole_model(model, candidates, target):
    """The paths that "all-linear" or "all" means, and why it leaves out others."""
    output_ids = targets.output_layers(model)
    meant, skipped = [], {}
    for path, site in candidates.items():
        layer = kinds.layer_of(site)
        if id(layer) in output_ids or is_named_bias(site):
            continue
        is_known = kinds.lora_class_of(type(layer)) is not None
        if target == "all" or (is_known and kinds.as_site(site).in_all_linear):
            meant.append(path)
        else:
            skipped[path] = why_not_linear(site)
    return meant, skipped


def notes_on_outputs(model, candidates, chosen) -> list:
    """Returns the report's notes on the layers that make the model's outputs."""
    output_ids = targets.output_layers(model)
    if not hasattr(model, "outputs") and isinstance(model, keras.Model):
        output_ids = targets.output_layers_of_call(
            model, layer_state.flatten_layers(model)
        )
        if not output_ids:
            return [
                f"{type(model).__name__} does not say which layers make its outputs: "
                "they are adapted like the others. Leave them out with exclude=, or "
                "train them in full with also_train."
            ]
    frozen, adapted = {}, {}
    for path, site in candidates.items():
        layer = kinds.layer_of(site)
        if id(layer) in output_ids:
            name = path if site is layer else path.removesuffix(f"/{site.weight_name}")
            (adapted if path in chosen else frozen)[name] = layer
    notes = []
    if adapted:
        notes.append(
            f"Output layers, adapted: {tables.join(list(adapted))} (leave them out "
            "with exclude=, or train them in full with also_train)"
        )
    if frozen:
        notes.append(
            f"Output layers, frozen: {tables.join(list(frozen))} (use also_train)"
        )
    return notes


def reassignment_reason(owner):
    """Says why W would not stay unchanged inside this owner, or None."""
    if isinstance(owner, keras.layers.SpectralNormalization):
        return "SpectralNormalization assigns to its kernel in every training call."
    return None


def warn_of_axes(adapted):
    """Warns of registered names that are no weight of a layer that is adapted."""
    missing = {}
    for layer in adapted:
        for weight in kinds.axes_without_weight(layer):
            missing[type(layer).__name__, weight] = list(kinds.sites_of(layer))
    for (kind, weight), others in missing.items():
        warn_caller(
            f"`register_lora_layer` names {weight!r} of {kind}, which has no such "
            f"weight here: it has {tables.join(others)}."
        )


def paths_of_weights(sites_by_path) -> dict:
    """Id of a weight -> the paths of all sites that have it."""
    found = collections.defaultdict(list)
    for path, site in sites_by_path.items():
        if site.built:
            found[id(kinds.as_site(site).frozen_kernel)].append(path)
    return found


def sharing_reason(path, site, holders):
    """Says why an adapter here would not cover all uses of its weight, or None."""
    others = [x for x in holders[id(kinds.as_site(site).frozen_kernel)] if x != path]
    if not others:
        return None
    return (
        f"{tables.join(others)} has the same weight, and an adapter would act in one "
        "of them only. Use one layer in both places, or train them with `also_train`."
    )


def no_effect_in(owner, layer):
    """Says why an adapter of this layer would have no effect in its owner, or None."""
    others_are_called = any(map(calls.was_called, layer_state.sublayers(owner)))
    if calls.was_called(layer) or not others_are_called:
        return None
    # Gemma 4's feed-forward blocks multiply with `self.gating_ffw.kernel`.
    return (
        f"{type(owner).__name__} reads the kernel of this layer itself, or does not "
        "use it: it has called other layers, but never this one. An adapter has no "
        "effect there until it is merged."
    )


def is_named_bias(site):
    return getattr(site, "weight_name", "").endswith("bias")


def why_not_linear(site):
    """Says why "all-linear" leaves a weight out, and what to do."""
    kind = type(kinds.layer_of(site)).__name__
    return (
        f'{kind} is not in "all-linear": use target="all", '
        "name it in `target`, or train the layer in full with `also_train`."
    )


def paths_of_rule(paths, candidates, target, trained):
    """Returns the paths of the sites that a user's rule means, in the model's order."""
    # A list may name a layer without weights: that is then the error.
    by_name = isinstance(target, (list, tuple, set, frozenset))
    by_name = by_name or (isinstance(target, str) and target in paths.layers)
    sites_of = {
        path: [x for x in own if x in candidates]
        for path, own in paths.sites_of.items()
    }
    layers_and_sites = candidates | {
        path: x for path, x in paths.layers.items() if by_name or sites_of[path]
    }
    meant = set()
    for path in matches_of(target, layers_and_sites, paths.sites, candidates):
        paths_there = [path] if path in candidates else sites_of[path]
        if not paths_there:
            raise ValueError(
                unsupported_message(path, paths.layers[path], trained, candidates)
            )
        meant |= {
            x for x in paths_there if x == path or not is_named_bias(candidates[x])
        }
    return [path for path in candidates if path in meant]


def matches_of(target, layers_and_sites, all_sites, candidates) -> list:
    """Returns the paths a target matches; raises if `also_train` has them all."""
    try:
        return targets.matching_paths(target, layers_and_sites, "target", candidates)
    except ValueError:
        every = {**layers_and_sites, **all_sites}
        matches = targets.matching_paths(target, every, "target", candidates)
    both = [path for path in matches if path in all_sites and path not in candidates]
    raise ValueError(
        f"`target` {target!r} names {tables.join(both)}, and `also_train` names the "
        "layer that holds it. Leave it out of one of them."
    )


def no_match_message(target, skipped):
    """Says why a target matches nothing that can be adapted, each reason once."""
    if not skipped:
        return (
            f"`target` {target!r} matches no layer: all weights that it could mean "
            "make the outputs. Name them in `target` to adapt them."
        )
    paths = collections.defaultdict(list)
    for path, why in skipped.items():
        paths[why].append(path)
    reasons = [f"{tables.join(own)}: {why}" for why, own in paths.items()]
    further = len(reasons) - 3
    further = f" {tables.plural(further, 'more reason')}." if further > 0 else ""
    return (
        f"`target` {target!r} matches no layer that is built and can be adapted. "
        f"{' '.join(reasons[:3])}{further}"
    )


def owner_of(paths, path, layer):
    """Returns the layer that holds the layer at a path, or the layer of that weight."""
    owner = path.rpartition("/")[0]
    while owner and paths.layers.get(owner, layer) is layer:
        owner = owner.rpartition("/")[0]
    return paths.layers.get(owner, paths.model)


def unsupported_message(path, layer, trained, candidates):
    if path in trained:
        return f"The layer {path!r} is in `target` and in `also_train`."
    held = [
        p
        for p, site in candidates.items()
        if kinds.as_site(site).kernel_owner() is layer
    ]
    if held:
        return (
            f"`target` names {path!r}, whose weights have adapters as those of the "
            f"layer around it: name {tables.join(held)}."
        )
    inside = [other for other in candidates if other.startswith(f"{path}/")]
    if inside:
        pattern = f"{re.escape(path)}/.*"
        return (
            f"`target` names {path!r}, a {type(layer).__name__}, which holds "
            f"{tables.join(inside)}: name them, or give the regular expression "
            f"{pattern!r}."
        )
    if isinstance(layer, LowRankAdapter):
        return f"`target` names {path!r}, which is an adapter."
    return (
        f"`target` names the layer {path!r}, a {type(layer).__name__}, which has no "
        "weight of two axes or more, so it cannot have an adapter. To train it in "
        "full, name it in `also_train`."
    )
