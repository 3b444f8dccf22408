"""The table of kinds: which LoRA class stands for which layer class."""

import functools

import keras

from keras_lora.keras_internals.classes import seen_as
from keras_lora.layers.conv import LoRAConv1D
from keras_lora.layers.conv import LoRAConv2D
from keras_lora.layers.conv import LoRAConv3D
from keras_lora.layers.dense import LoRADense
from keras_lora.layers.einsum_dense import LoRAEinsumDense
from keras_lora.layers.embedding import LoRAEmbedding
from keras_lora.layers.lora_layer import LoRALayer

LORA_CLASSES = {
    keras.layers.Dense: LoRADense,
    keras.layers.EinsumDense: LoRAEinsumDense,
    keras.layers.Embedding: LoRAEmbedding,
    keras.layers.Conv1D: LoRAConv1D,
    keras.layers.Conv2D: LoRAConv2D,
    keras.layers.Conv3D: LoRAConv3D,
}
if hasattr(keras.layers, "ReversibleEmbedding"):  # since Keras 3.13
    from keras_lora.layers.reversible_embedding import LoRAReversibleEmbedding

    LORA_CLASSES[keras.layers.ReversibleEmbedding] = LoRAReversibleEmbedding


def register_lora_layer(lora_class: type) -> type:
    """Teaches `apply_lora` a kind of layer; can be used as a decorator.

    Args:
        lora_class: A subclass of `keras_lora.LoRALayer` whose `plain_class` is the
            layer class that it adapts.

    Returns:
        The same class.

    Raises:
        ValueError: If it is none.
    """
    plain_class = getattr(lora_class, "plain_class", None)
    if not (isinstance(plain_class, type) and issubclass(lora_class, LoRALayer)):
        raise ValueError(
            "A LoRA layer is a subclass of keras_lora.LoRALayer with a `plain_class`. "
            f"Received: {lora_class!r}."
        )
    LORA_CLASSES[plain_class] = lora_class
    lora_class_of.cache_clear()
    return lora_class


def kind_of(cls):
    """The kind of a layer class, by which its weights look in files.

    Also where its `call` is its own; LoRALayer itself where it is of no kind.
    """
    if issubclass(cls, LoRALayer):
        return cls
    return next((LORA_CLASSES[x] for x in cls.__mro__ if x in LORA_CLASSES), LoRALayer)


@functools.cache
def lora_class_of(cls):
    """The LoRA class for a layer class; None where its call is not understood."""
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


def obstacle(layer):
    """Why a layer of a supported class cannot be adapted, or None."""
    if not layer.built:
        return "it was never built."
    try:
        lora_class_of(type(layer)).check_host(layer)
    except ValueError as error:
        return str(error)
    return None


def form_of(layer, rank):
    """The form that an adapter has, or would have, on a built layer."""
    if not isinstance(layer, LoRALayer):
        layer = seen_as(layer, kind_of(type(layer)))
    return layer.low_rank_form(rank)
