"""Merged artefacts: what is served needs no keras_lora."""

from keras_lora.models.atomic import replacing
from keras_lora.models.merge import merged_meanwhile


def export(model, path, format="tf_saved_model", **kwargs):
    """Writes the merged model as an artefact for inference.

    The artefact holds plain layers with W + delta for kernels, no A and no B, and
    gives the live model's predictions. It is written beside `path` and renamed,
    so a failure leaves an earlier artefact whole; the live model stays as it is.

    Args:
        model: A Keras model that holds LoRA layers.
        path: Where to write; what stands there is replaced.
        format: "tf_saved_model", or another format of `keras.Model.export`.
        kwargs: Further arguments of `keras.Model.export`.

    Raises:
        ValueError: If the model is not built, holds no LoRA layer, or an adapter
            is not finite.
    """
    if not getattr(model, "built", False):
        raise ValueError(
            f"The model {model.name!r} is not built, so its input shape is unknown. "
            "Call it once, or `model.build(input_shape)`, then export."
        )
    kwargs.setdefault("verbose", False)
    with replacing(path) as new, merged_meanwhile(model):
        model.export(str(new), format=format, **kwargs)
