"""Runs an exported artefact once, in its own runtime."""

import importlib.util
import warnings

import numpy as np


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

        Interpreter = tf.lite.Interpreter  # which warns that it is the old one
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
                "OpenVINO computes a product of integers, as of int8 kernels with "
                "quantized activations, wrongly."
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


# Format -> (the package that runs it, a function of the path).
RUNTIMES = {
    "tf_saved_model": ("tensorflow", run_saved_model),
    "litert": ("tensorflow", run_litert),
    "onnx": ("onnxruntime", run_onnx),
    "openvino": ("openvino", run_openvino),
    "torch": ("torch", run_torch),
}


def assert_runs(path, format):
    """Raises ValueError if the artefact cannot be opened and run on zeros.

    Where the package that would run it is not installed, nobody knows.
    """
    package, run = RUNTIMES.get(format, (None, None))
    if package is None or importlib.util.find_spec(package) is None:
        return
    try:
        run(str(path))
    except Exception as error:  # whatever the runtime raises
        raise ValueError(
            f"The artefact in {format!r} cannot be run: {error}\nIt was deleted. Check "
            "whether the plain model's artefact runs, or choose another format."
        ) from error
