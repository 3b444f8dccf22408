"""Merged artefacts: what is served needs no keras_lora."""

import os
from pathlib import Path

from keras_lora.keras_internals.layers import checked_model
from keras_lora.models.adapt import lora_layers
from keras_lora.models.atomic import entries
from keras_lora.models.atomic import refuse_file_name
from keras_lora.models.atomic import replacing
from keras_lora.models.merge import merged_meanwhile

SAVED_MODEL = {"saved_model.pb", "fingerprint.pb", "variables", "assets"}


def export(model, path, format="tf_saved_model", **kwargs):
    """Writes the merged model as an artefact for inference.

    The artefact holds plain layers with W + delta for kernels, no A and no B, and
    gives the live model's predictions. It is written beside `path` and renamed,
    so a failure leaves an earlier artefact whole; the live model stays as it is.
    A folder that holds anything but an earlier artefact is not touched.

    Args:
        model: A Keras model that holds LoRA layers.
        path: Where to write: an earlier artefact there is replaced, an empty folder
            is filled, a link is followed.
        format: "tf_saved_model", or another format of `keras.Model.export`.
        kwargs: Further arguments of `keras.Model.export`.

    Raises:
        ValueError: If the model is not built, holds no LoRA layer, or an adapter is
            not finite.
        OSError: If the artefact cannot be written: FileExistsError where `path` is a
            folder with other things in it.
    """
    checked_model(model)
    if not model.built:
        raise ValueError(
            f"The model {model.name!r} is not built, so its input shape is unknown. "
            "Call it once, or `model.build(input_shape)`, then export."
        )
    if not lora_layers(model):
        raise ValueError(
            f"{model.name!r} holds no adapter: none was applied, or they are merged. A "
            "plain model is exported with model.export(path)."
        )
    assert_replaceable(path, format)
    kwargs.setdefault("verbose", False)
    with replacing(path) as new, merged_meanwhile(model):
        model.export(str(new), format=format, **kwargs)


def assert_replaceable(path, format):
    """A folder at the path is empty or an earlier artefact: nothing else is lost."""
    if format == "tf_saved_model":
        refuse_file_name(path, "a SavedModel")
    if not os.path.isdir(path):
        return
    if format != "tf_saved_model":
        raise FileExistsError(
            f"`path` {str(path)!r} is a folder, and format={format!r} writes a file. "
            "Give the path of a file in it."
        )
    found = entries(path)
    others = sorted(found - SAVED_MODEL) if "saved_model.pb" in found else sorted(found)
    if others:
        raise FileExistsError(
            f"`path` {str(path)!r} is a folder that holds {', '.join(others[:5])}: an "
            "export would replace the whole folder. Give a path inside it, such as "
            f"{str(Path(path, 'served'))!r}."
        )
    if found and os.path.samefile(path, "."):
        raise FileExistsError(
            f"`path` {str(path)!r} is the folder that this process stands in, which "
            "would be exchanged for another. Export from outside of it."
        )
