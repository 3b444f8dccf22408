"""The table of kinds: layer class -> LoRA class."""

import collections
import functools
from collections.abc import Mapping

import keras
from keras.layers import Layer

from keras_lora.keras_internals import classes, layer_state
from keras_lora.layers import (
    conv,
    dense,
    einsum_dense,
    embedding,
    experts,
    recurrent,
    substituted_conv,
)
from keras_lora.layers.adapter import LowRankAdapter
from keras_lora.layers.form import Axes
from keras_lora.layers.lora_layer import LoRALayer
from keras_lora.layers.site import Site
from keras_lora.layers.substituted import SeveralWeights, SubstitutedLayer, WeightSite

KINDS = [
    conv.LoRAConv1D,
    conv.LoRAConv2D,
    conv.LoRAConv3D,
    dense.LoRADense,
    einsum_dense.LoRAEinsumDense,
    embedding.LoRAEmbedding,
    recurrent.LoRAGRU,
    recurrent.LoRALSTM,
    recurrent.LoRARNN,
    recurrent.LoRASimpleRNN,
    substituted_conv.LoRAConv1DTranspose,
    substituted_conv.LoRAConv2DTranspose,
    substituted_conv.LoRAConv3DTranspose,
    substituted_conv.LoRADepthwiseConv1D,
    substituted_conv.LoRADepthwiseConv2D,
    substituted_conv.LoRASeparableConv1D,
    substituted_conv.LoRASeparableConv2D,
]
if hasattr(keras.layers, "ReversibleEmbedding"):  # since Keras 3.13
    from keras_lora.layers.reversible_embedding import LoRAReversibleEmbedding

    KINDS.append(LoRAReversibleEmbedding)
LORA_CLASSES: dict = {kind.plain_class: kind for kind in KINDS}


# Layer class -> {weight: Axes}, as given to `register_lora_layer`.
AXES: dict[type, dict] = {}


def register_lora_layer(lora_class: type, weights: Mapping | None = None) -> type:
    """Registers a kind of layer for `apply_lora`; can be used as a decorator.

    Args:
        lora_class: A subclass of `keras_lora.LoRALayer` whose `plain_class` is the
            layer class that it adapts. Or, with `weights`, that layer class itself.
        weights: Name of a weight -> the axes of its inputs, as a tuple, or a dict of
            `input_axes` and `batch_axes`; a batch axis counts the matrices of a stack.
            The other axes are outputs. The layer's own call runs with W + delta instead
            of each weight W that `apply_lora` adapts.

    Returns:
        The same class.

    Raises:
        ValueError: If `lora_class` is not such a class, or the axes are not valid.

    Examples:
        >>> class Filters(keras.layers.Layer):
        ...     def build(self, input_shape):
        ...         self.w = self.add_weight(shape=(8, input_shape[-1]), name="w")
        ...
        ...     def call(self, inputs):
        ...         return keras.ops.matmul(inputs, keras.ops.transpose(self.w))
        >>> kind = register_lora_layer(Filters, weights={"w": (1,)})
    """
    if weights is not None:
        if not (isinstance(lora_class, type) and issubclass(lora_class, Layer)):
            raise ValueError(
                "With `weights`, register_lora_layer takes a layer class. Received: "
                f"{lora_class!r}."
            )
        known = lora_class_of(lora_class) or issubclass(lora_class, LoRALayer)
        if known or issubclass(lora_class, keras.Model):
            raise ValueError(
                f"The axes of a {lora_class.__name__}'s weights cannot be chosen: "
                "`weights` is for layers whose call keras_lora does not know."
            )
        if not isinstance(weights, Mapping) or not weights:
            raise ValueError(
                "`weights` must be a dict from names of weights to axes. Received: "
                f"{weights!r}."
            )
        AXES[lora_class] = {w: validate_axes(w, axes) for w, axes in weights.items()}
        substituted_class.cache_clear()
        return lora_class
    plain_class = getattr(lora_class, "plain_class", None)
    if not (isinstance(plain_class, type) and issubclass(lora_class, LoRALayer)):
        raise ValueError(
            "`lora_class` must be a subclass of LoRALayer with a `plain_class`. "
            f"Received: {lora_class!r}."
        )
    LORA_CLASSES[plain_class] = lora_class
    lora_class_of.cache_clear()
    return lora_class


def validate_axes(weight, axes) -> Axes:
    """Checks the axes that a user gives for a weight."""
    named = dict(axes) if isinstance(axes, Mapping) else {"input_axes": axes}
    groups = [named.pop(name, ()) for name in ("input_axes", "batch_axes")]
    groups = [tuple(x) if isinstance(x, (list, tuple)) else (x,) for x in groups]
    every = [axis for group in groups for axis in group]
    whole = all(type(axis) is int and axis >= 0 for axis in every)
    if named or not groups[0] or not whole or len(set(every)) < len(every):
        raise ValueError(
            f"The axes of {weight!r} must be a tuple of the axes of its inputs, or a "
            "dict of `input_axes` and `batch_axes`: different whole numbers >= 0. "
            f"Received: {axes!r}."
        )
    return Axes(*groups)


def refuse_axes(site):
    """Raises ValueError if the registered axes do not fit a weight's shape."""
    site = as_site(site)
    given = registered_axes(type(layer_of(site))).get(site.weight_name)
    if given and max(map(max, filter(None, given))) >= len(site.kernel_shape):
        raise ValueError(
            f"`register_lora_layer` has {given} for {site.weight_name!r}, whose shape "
            f"is {site.kernel_shape}: axes are counted from 0."
        )


def axes_without_weight(layer) -> list:
    """The weights that `register_lora_layer` names and that a layer does not have."""
    return [w for w in registered_axes(type(layer)) if w not in sites_of(layer)]


def registered_axes(cls) -> dict:
    axes = [AXES[base] for base in cls.__mro__ if base in AXES]
    return dict(collections.ChainMap(*axes))


def kind_of(layer):
    """The kind of a layer, which decides how its weights are stored in files.

    A subclass with its own `call` has one too; LoRALayer itself if there is none.
    """
    if isinstance(layer, Site):
        return layer.lora_class
    mro = type(layer).__mro__
    return next((LORA_CLASSES[cls] for cls in mro if cls in LORA_CLASSES), LoRALayer)


@functools.cache
def lora_class_of(cls):
    """The LoRA class for a layer class; None if its call is not known."""
    if issubclass(cls, LoRALayer):
        return None
    for base in cls.__mro__:
        if base in LORA_CLASSES:
            lora_class = LORA_CLASSES[base]
            if any(
                getattr(cls, m) is not getattr(base, m) for m in lora_class.replaces
            ):
                return None
            if base is cls:
                return lora_class
            name = f"LoRA{cls.__name__}"
            return type(name, (lora_class, cls), {"plain_class": cls})
    return None


@functools.cache
def substituted_class(cls, weight):
    """The LoRA class for a layer class that is of no kind.

    weight: Its only weight that can be adapted, or None if there are several.
    """
    mixin = SeveralWeights if weight is None else SubstitutedLayer
    mixin = experts.Experts if experts.is_expert_layer(cls) else mixin
    attributes = {
        "plain_class": cls,
        "kernel_name": weight,
        "adapted_weights": (),
        "weight_axes": registered_axes(cls),
        "constructs": False,
    }
    return type(f"LoRA{cls.__name__}", (mixin, cls), attributes)


def class_with_adapter(layer):
    """The LoRA class of a layer with adapters; None if it has nothing to adapt."""
    if isinstance(layer, LoRALayer):
        return type(layer)
    lora_class = lora_class_of(type(layer))
    if lora_class is not None or isinstance(layer, (keras.Model, LowRankAdapter)):
        return lora_class
    names = list(layer_state.weight_places(layer))
    if not names:
        return None
    return substituted_class(type(layer), names[0] if len(names) == 1 else None)


def sites_of(layer) -> dict:
    """Weight -> site, for all weights of a layer that can have an adapter.

    A layer with one kernel is its own site, also while it is plain.
    """
    kind = class_with_adapter(layer)
    if kind is None:
        return {}
    if kind.kernel_name is None:
        itself = {}
        places = {w: keys for w, (keys, *_) in kind.places_of(layer).items()}
    else:
        itself, places = {kind.kernel_name: layer}, {}
        if kind.more_weights:
            all_places = layer_state.weight_places(layer)
            places = {w: all_places[w] for w in kind.more_weights if w in all_places}
    sites = {w: WeightSite(layer, w, keys, kind) for w, keys in places.items()}
    return itself | sites


def layer_of(site):
    """The layer in whose call the adapter of a site acts."""
    return site.layer if isinstance(site, WeightSite) else site


def wrapped_layers(layer) -> tuple:
    """Returns the layers inside a Keras wrapper, which a rule that names it adapts."""
    if isinstance(layer, keras.layers.Bidirectional):
        return layer.forward_layer, layer.backward_layer
    return (layer.layer,) if isinstance(layer, keras.layers.TimeDistributed) else ()


def looks_up(site):
    """Whether a layer picks rows of its kernel by ids."""
    is_table = not isinstance(site, WeightSite)  # not an untied head
    return is_table and issubclass(kind_of(site), embedding.LoRAEmbedding)


def out_of_reach(layer) -> dict:
    """Weight -> why it cannot have an adapter, for a layer's own matrices."""
    unheld = dict.fromkeys(
        layer_state.unheld_weights(layer),
        "its layer holds it in no attribute, list or dict, where an adapter could take "
        "its place: train the layer in full with `also_train`.",
    )
    if isinstance(layer, keras.Model):
        return unheld | dict.fromkeys(
            layer_state.weight_places(layer),
            "it belongs to the model itself, and only weights of layers can have "
            "adapters.",
        )
    lora_class = class_with_adapter(layer)
    if lora_class is None or issubclass(lora_class, SubstitutedLayer):
        return unheld
    kernel = lora_class.kernel_name
    known = (kernel, *lora_class.more_weights)
    others = [
        x
        for x in layer_state.weight_places(layer)
        if x not in known and "bias" not in x
    ]
    name = lora_class.plain_class.__name__
    return unheld | dict.fromkeys(
        others,
        f"an adapter of a {name} does not cover it: train the layer in full with "
        "`also_train`.",
    )


def obstacle(site):
    """Says why a site cannot be adapted, or None."""
    if not site.built:
        return "it was never built."
    try:
        refuse_axes(site)
        if isinstance(site, WeightSite):
            site.refuse_unadaptable()
        else:
            class_with_adapter(site).check_host(site)
    except ValueError as error:
        return str(error)
    return None


def as_site(site):
    """Returns a plain layer seen as a site; a site is returned unchanged."""
    if isinstance(site, Site):
        return site
    return classes.view_as(site, class_with_adapter(site) or kind_of(site))


def form_of(site, rank):
    """The form that an adapter has, or would have, at a site of a built layer."""
    return as_site(site).low_rank_form(rank)


def shape_of(site) -> tuple:
    """The shape of a site's kernel."""
    return tuple(as_site(site).kernel_shape)
