"""Merged artifacts, which are served without keras_lora."""

import difflib
import importlib.util
import os
import warnings
from pathlib import Path

import keras
import numpy as np

from keras_lora.keras_internals import distribution, layer_state, processes
from keras_lora.models import atomic, contexts, sites

SAVED_MODEL = {"saved_model.pb", "fingerprint.pb", "variables", "assets"}
FORMATS = ("tf_saved_model", "onnx", "openvino", "litert", "torch")


def export(
    model: keras.layers.Layer,
    path: str | os.PathLike,
    format: str = "tf_saved_model",
    **kwargs,
):
    """Writes the merged model as an artifact for inference.

    The artifact has plain layers with the kernels W + delta, without A and B, and
    gives the predictions of the live model, which is not changed. It is written under
    another name and renamed, so a failure leaves an earlier artifact intact. A folder
    that holds anything other than an earlier artifact is not touched. The artifact is
    run once on zeros if its runtime is installed (TensorFlow, onnxruntime, OpenVINO or
    torch), but not if `target_spec` describes another runtime of LiteRT.

    If the model is distributed over several processes, all of them must make this call,
    and the first one writes. On JAX, its host then holds the whole merged model.

    Args:
        model: A Keras model that holds LoRA layers.
        path: Where to write. An earlier artifact is replaced, an empty folder is
            filled, and links are followed.
        format: "tf_saved_model", or another format of `keras.Model.export`.
        kwargs: Further arguments of `keras.Model.export`.

    Raises:
        ValueError: If the model is not built or holds no LoRA layer, an adapter is not
            finite, or the artifact cannot be run.
        OSError: If the artifact cannot be written; FileExistsError if `path` is a
            folder with other files in it.

    Examples:
        >>> keras_lora.export(model, "served")
        >>> keras_lora.export(model, "model.tflite", format="litert")  # doctest: +SKIP
    """
    layer_state.validate_model(model)
    if not model.built:
        raise ValueError(
            f"The model {model.name!r} is not built, so its input shape is unknown. "
            "Call it once, or `model.build(input_shape)`, then export."
        )
    if not sites.adapted_sites(model):
        raise ValueError(
            f"{model.name!r} has no adapters: none was applied, or they were merged. "
            "Export a plain model with model.export(path)."
        )
    refuse_unknown_format(format)
    refuse_format_of_other_backends(format)
    processes.run_on_all(model, lambda: refuse_occupied_path(path, format))
    kwargs.setdefault("verbose", False)

    def write():
        with distribution.whole_on_host(model) as is_writer:
            if is_writer:
                with atomic.replacing(path) as new:
                    model.export(str(new), format=format, **kwargs)
                    if "target_spec" not in kwargs:
                        refuse_broken_artifact(new, format)

    with contexts.listing_merged_kernels(model):
        processes.run_on_all(model, write)


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


def refuse_occupied_path(path, format):
    """Raises unless the path is free, an empty folder or an earlier artifact."""
    if format == "tf_saved_model":
        atomic.refuse_file_name(path, "a SavedModel")
    if not os.path.isdir(path):
        return
    if format != "tf_saved_model":
        raise FileExistsError(
            f"`path` {str(path)!r} is a folder, and format={format!r} writes a file. "
            "Give the path of a file in it."
        )
    entries = atomic.entries(path)
    foreign = entries - SAVED_MODEL if "saved_model.pb" in entries else entries
    if foreign:
        raise FileExistsError(
            f"`path` {str(path)!r} is a folder that holds "
            f"{', '.join(sorted(foreign)[:5])}: an export would replace the whole "
            "folder. Give a path inside it, such as "
            f"{str(Path(path, 'served'))!r}."
        )
    if entries and os.path.samefile(path, "."):
        raise FileExistsError(
            f"`path` {str(path)!r} is the current working directory, which the export "
            "would replace. Give a path inside it, or export from another directory."
        )


def run_saved_model(path):
    import tensorflow as tf

    served = tf.saved_model.load(path).signatures["serving_default"]
    specs = served.structured_input_signature[1]
    served(**{name: tf.zeros(*shape_and_type(x)) for name, x in specs.items()})


def shape_and_type(spec):
    return [size or 1 for size in spec.shape], spec.dtype


def run_litert(path):
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        import tensorflow as tf

        Interpreter = tf.lite.Interpreter  # deprecated, with a warning
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        served = Interpreter(path).get_signature_runner()
    details = served.get_input_details()
    served(**{name: np.zeros(x["shape"], x["dtype"]) for name, x in details.items()})


def run_onnx(path):
    import onnxruntime

    served = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    served.run(
        None,
        {
            spec.name: np.zeros(
                [size if isinstance(size, int) else 1 for size in spec.shape],
                ONNX_TYPES.get(spec.type, spec.type[len("tensor(") : -1]),
            )
            for spec in served.get_inputs()
        },
    )


ONNX_TYPES = {"tensor(float)": "float32", "tensor(double)": "float64"}


def run_openvino(path):
    import openvino

    model = openvino.Core().read_model(path)
    for operation in model.get_ops():
        is_product = operation.get_type_name() == "MatMul"
        if is_product and operation.get_input_element_type(0).is_integral():
            raise ValueError(
                "OpenVINO gives wrong results for products of integers, which int8 "
                "kernels with quantized activations have."
            )
    served = openvino.compile_model(model, "CPU")
    served([np.zeros(*openvino_shape_and_type(x)) for x in served.inputs])


def openvino_shape_and_type(port):
    sizes = [size.get_length() if size.is_static else 1 for size in port.partial_shape]
    return sizes, port.element_type.to_dtype()


def run_torch(path):
    import torch

    served = torch.export.load(path)
    args, kwargs = served.example_inputs
    served.module()(*args, **kwargs)


# Format -> (the package that runs it, a function of the path that does).
RUNTIMES = {
    "tf_saved_model": ("tensorflow", run_saved_model),
    "litert": ("tensorflow", run_litert),
    "onnx": ("onnxruntime", run_onnx),
    "openvino": ("openvino", run_openvino),
    "torch": ("torch", run_torch),
}


def refuse_broken_artifact(path, format):
    """Raises ValueError if the artifact cannot be opened and run on zeros.

    Nothing is checked if the package that runs it is not installed.
    """
    package, run = RUNTIMES.get(format, (None, None))
    if package is None or importlib.util.find_spec(package) is None:
        return
    try:
        run(str(path))
    except Exception as error:  # a runtime may raise anything
        raise ValueError(
            f"The artifact in {format!r} cannot be run: {error}\nIt was deleted. Check "
            "whether the plain model's artifact runs, or choose another format."
        ) from error
