"""The table of kinds: which LoRA class stands for which layer class."""

import functools

import keras

from keras_lora.layers.conv import LoRAConv1D
from keras_lora.layers.conv import LoRAConv2D
from keras_lora.layers.conv import LoRAConv3D
from keras_lora.layers.dense import LoRADense
from keras_lora.layers.einsum_dense import LoRAEinsumDense
from keras_lora.layers.einsum_dense import split_equation
from keras_lora.layers.embedding import LoRAEmbedding
from keras_lora.layers.lora_layer import LoRALayer
from keras_lora.layers.lora_layer import refuse_unsupported_host

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


@functools.cache
def lora_class_of(cls):
    """The LoRA class for a layer class; None where its call is not understood."""
    for base in cls.__mro__:
        if base in LORA_CLASSES:
            if cls.call is not base.call:
                return None
            lora_class = LORA_CLASSES[base]
            if base is cls:
                return lora_class
            name = f"LoRA{cls.__name__}"
            return type(name, (lora_class, cls), {"plain_class": cls})
    return None


def obstacle(layer):
    """Why a layer of a supported class cannot be adapted, or None."""
    if not layer.built:
        return "it was never built."
    lora_class = lora_class_of(type(layer))
    try:
        refuse_unsupported_host(layer, lora_class.kernel_name)
        if isinstance(layer, keras.layers.EinsumDense):
            split_equation(layer.equation)
    except ValueError as error:
        return str(error)
    return None
