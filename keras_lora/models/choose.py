"""Which layers of a model get an adapter, and why others do not."""

import collections
import re

from keras_lora.keras_internals.calls import warn_caller
from keras_lora.keras_internals.layers import flatten_layers
from keras_lora.keras_internals.layers import own_variables
from keras_lora.layers.kinds import LORA_CLASSES
from keras_lora.layers.kinds import kind_of
from keras_lora.layers.kinds import lora_class_of
from keras_lora.layers.kinds import obstacle
from keras_lora.models.adapt import assigns_to
from keras_lora.models.adapt import passed_by
from keras_lora.models.tables import counted
from keras_lora.models.tables import listed
from keras_lora.models.targets import matching
from keras_lora.models.targets import output_layers


def choose(model, paths, target, exclude, trained):
    """Path -> layer to adapt, and path -> reason for those passed over."""
    inside_trained = tuple(f"{path}/" for path in trained)
    supported = {
        path: layer
        for path, layer in paths.items()
        if lora_class_of(type(layer)) is not None
        and path not in trained
        and not path.startswith(inside_trained)
    }
    everything = isinstance(target, str) and target == "all-linear"
    by_name = isinstance(target, (list, tuple, set, frozenset))
    skipped = {}
    if everything:
        heads = output_layers(model)
        found = [
            path
            for path, layer in supported.items()
            if kind_of(type(layer)).in_all_linear and id(layer) not in heads
        ]
        skipped = {
            path: f"{type(layer).__name__} is of no kind that is supported."
            for path, layer in paths.items()
            if has_other_kernel(layer)
            and id(layer) not in heads
            and path not in trained
            and not path.startswith(inside_trained)
        }
    else:
        # A list that names a layer of another kind gets that as its error.
        by_path = isinstance(target, str) and target in paths
        layers = paths if by_name or by_path else supported
        found = matching(target, layers, "target", supported)
        for path in found:
            if path not in supported:
                raise ValueError(unsupported(path, paths[path], trained, supported))
    if exclude is not None:
        excluded = set(matching(exclude, paths, "exclude"))
        if found and excluded.issuperset(found):
            raise ValueError(
                f"`exclude` {exclude!r} leaves nothing of `target` {target!r}."
            )
        found = [path for path in found if path not in excluded]
        skipped = {p: why for p, why in skipped.items() if p not in excluded}
    chosen = {}
    for path in found:
        layer, owner = paths[path], owner_of(model, paths, path)
        reason = obstacle(layer) or assigns_to(owner)
        if reason and by_name and layer.built:
            raise ValueError(
                f"The layer {path!r} cannot be adapted: {reason} Leave it out with "
                "exclude=."
            )
        no_effect = passed_by(owner, layer)
        if reason or (everything and no_effect):
            skipped[path] = reason or no_effect
        else:
            chosen[path] = layer
            if no_effect:
                warn_caller(f"{path!r}: {no_effect}")
    if not chosen:
        raise ValueError(nothing(target, skipped))
    return chosen, skipped


def nothing(target, skipped):
    """Why a target means nothing that can be adapted, each reason once."""
    if not skipped:
        return (
            "`target` 'all-linear' matches no layer: there is no Dense, EinsumDense or "
            "convolution but those that make the outputs."
        )
    paths = collections.defaultdict(list)
    for path, why in skipped.items():
        paths[why].append(path)
    reasons = [f"{listed(found)}: {why}" for why, found in paths.items()]
    more = f" {counted(len(reasons) - 3, 'more reason')}." if len(reasons) > 3 else ""
    return (
        f"`target` {target!r} matches no layer that is built and can be adapted. "
        f"{' '.join(reasons[:3])}{more}"
    )


def has_other_kernel(layer):
    """Whether a layer has a kernel of its own, and is of no kind that is supported."""
    kernels = {
        id(variable)
        for variable in own_variables(layer)
        if "kernel" in variable.name and len(variable.shape) > 1
    }
    if not kernels or lora_class_of(type(layer)) is not None:
        return False
    # A wrapper holds that of its layer too.
    inside = [part for part in flatten_layers(layer) if part is not layer]
    return bool(kernels - {id(v) for part in inside for v in own_variables(part)})


def owner_of(model, paths, path):
    """The layer that holds the one at a path."""
    owner = path.rpartition("/")[0]
    while owner and owner not in paths:
        owner = owner.rpartition("/")[0]
    return paths.get(owner, model)


def unsupported(path, layer, trained, supported):
    if path in trained:
        return f"The layer {path!r} is in `target` and in `also_train`."
    inside = [other for other in supported if other.startswith(f"{path}/")]
    if inside:
        pattern = f"{re.escape(path)}/.*"
        return (
            f"`target` names {path!r}, a {type(layer).__name__}, which holds "
            f"{listed(inside)}: name those, or give the expression {pattern!r}."
        )
    return (
        f"`target` names the layer {path!r}, a {type(layer).__name__}. Supported are "
        f"{', '.join(cls.__name__ for cls in LORA_CLASSES)} and subclasses that do not "
        "change their `call`; `register_lora_layer` adds a kind."
    )
