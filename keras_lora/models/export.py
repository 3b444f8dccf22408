"""Merged artefacts: what is served needs no keras_lora."""

import difflib
import importlib.util
import os
from pathlib import Path

import keras

from keras_lora.keras_internals import processes
from keras_lora.keras_internals.distribution import whole_on_host
from keras_lora.keras_internals.layers import checked_model
from keras_lora.models.atomic import entries
from keras_lora.models.atomic import refuse_file_name
from keras_lora.models.atomic import replacing
from keras_lora.models.merge import listing_merged_kernels
from keras_lora.models.runtimes import assert_runs
from keras_lora.models.sites import adapted_sites

SAVED_MODEL = {"saved_model.pb", "fingerprint.pb", "variables", "assets"}
FORMATS = ("tf_saved_model", "onnx", "openvino", "litert", "torch")


def export(
    model: keras.layers.Layer,
    path: str | os.PathLike,
    format: str = "tf_saved_model",
    **kwargs,
):
    """Writes the merged model as an artefact for inference.

    The artefact has plain layers with the kernels W + delta, without A and B, and
    gives the predictions of the live model, which is not changed. It is written under
    another name and renamed, so a failure leaves an earlier artefact intact. A folder
    that holds anything else than an earlier artefact is not touched. The artefact is
    run once on zeros if its runtime is installed (TensorFlow, onnxruntime, OpenVINO or
    torch), but not if `target_spec` describes another runtime of LiteRT.

    Where the model lies over several processes of JAX, all of them call: the first
    writes, and its host holds the whole merged model meanwhile.

    Args:
        model: A Keras model that holds LoRA layers.
        path: Where to write: an earlier artefact there is replaced, an empty folder
            is filled, a link is followed.
        format: "tf_saved_model", or another format of `keras.Model.export`.
        kwargs: Further arguments of `keras.Model.export`.

    Raises:
        ValueError: If the model is not built, holds no LoRA layer, or an adapter is
            not finite, or if the artefact cannot be run.
        OSError: If the artefact cannot be written: FileExistsError where `path` is a
            folder with other things in it.

    Examples:
        >>> keras_lora.export(model, "served")
        >>> keras_lora.export(model, "model.tflite", format="litert")  # doctest: +SKIP
    """
    checked_model(model)
    if not model.built:
        raise ValueError(
            f"The model {model.name!r} is not built, so its input shape is unknown. "
            "Call it once, or `model.build(input_shape)`, then export."
        )
    if not adapted_sites(model):
        raise ValueError(
            f"{model.name!r} has no adapters: none was applied, or they were merged. "
            "Export a plain model with model.export(path)."
        )
    refuse_unknown_format(format)
    refuse_format_of_other_backends(format)
    processes.on_all(model, lambda: assert_replaceable(path, format))
    kwargs.setdefault("verbose", False)

    def write():
        with whole_on_host(model) as is_writer:
            if is_writer:
                with replacing(path) as new:
                    model.export(str(new), format=format, **kwargs)
                    if "target_spec" not in kwargs:
                        assert_runs(new, format)

    with listing_merged_kernels(model):
        processes.on_all(model, write)


def refuse_unknown_format(format):
    if format not in FORMATS:
        close = difflib.get_close_matches(str(format), FORMATS, n=1, cutoff=0.3)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"`format` must be one of {', '.join(map(repr, FORMATS))}. Received: "
            f"format={format!r}.{hint}"
        )


def refuse_format_of_other_backends(format):
    on_torch = keras.backend.backend() == "torch"
    if on_torch and format == FORMATS[0] and not importlib.util.find_spec("torch_xla"):
        raise ValueError(
            f"Keras writes no {format!r}, the default format, from the torch backend "
            'without the package torch_xla. Give format="torch" and a path that ends '
            'with .pt2, or format="onnx".'
        )


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
            f"`path` {str(path)!r} is the current working directory, which the export "
            "would replace. Give a path inside it, or export from another directory."
        )
