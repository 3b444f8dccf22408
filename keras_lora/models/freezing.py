"""Which variables train beside the adapters."""

from keras_lora.keras_internals import compile_again
from keras_lora.keras_internals import flatten_layers
from keras_lora.keras_internals import own_variables
from keras_lora.models.adapt import built_lora_layers

BIAS = ("none", "all", "lora_only")


def mark_only_lora_as_trainable(model, bias="none"):
    """Freezes everything but A, B and the biases asked for.

    Layers in which nothing trains are frozen as layers, so that batch
    normalization keeps its moving statistics. A model that was compiled is
    compiled again with the same settings; its optimizer starts anew.

    Args:
        model: Any Keras model that holds LoRA layers.
        bias: "none": no bias trains. "lora_only": the biases of the adapted
            layers do. "all": every bias of the model does.

    Raises:
        ValueError: If `bias` is another word, or there is no LoRA layer.
    """
    checked_bias(bias)
    built_lora_layers(model)
    freeze_all_but_lora(model, bias)
    compile_again(model)


def freeze_all_but_lora(model, bias="none", also_train=()):
    """The same without compiling; the layers in `also_train` train as a whole."""
    adapted = built_lora_layers(model)
    kept = {id(v) for layer in adapted for v in own_variables(layer.lora)}
    for layer in {"none": [], "lora_only": adapted, "all": flatten_layers(model)}[bias]:
        kept |= {id(v) for v in own_variables(layer) if v.name == "bias"}
    for layer in also_train:
        for part in flatten_layers(layer):
            kept |= {id(v) for v in own_variables(part)}
    # From the outside in: what is set on a layer reaches the layers inside it.
    for layer in flatten_layers(model):
        variables = [v for part in flatten_layers(layer) for v in own_variables(part)]
        layer.trainable = any(id(v) in kept for v in variables)
        for variable in own_variables(layer):
            variable.trainable = id(variable) in kept


def checked_bias(bias):
    if bias not in BIAS:
        raise ValueError(
            f"`bias` must be one of {', '.join(map(repr, BIAS))}. "
            f"Received: bias={bias!r}."
        )
