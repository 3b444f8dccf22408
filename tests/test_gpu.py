"""The TensorFlow backend on a GPU: the numbers of the CPU, and W at rest."""

import keras
import numpy as np
import pytest
from layer_cases import CASES, fill, to_numpy

DEVICES = []
if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    DEVICES = tf.config.list_logical_devices("GPU")
DEVICE = DEVICES[0].name if DEVICES else "GPU:0"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not DEVICES, reason="TensorFlow sees no GPU"),
]


def trained(case, device, dtype="float32", jit=False):
    """A layer's outputs and factors after three steps on a device."""
    with tf.device(device):
        keras.utils.set_random_seed(0)
        model = case.model(dtype=dtype)
        lora = model.layers[0].lora
        for seed, factor in enumerate((lora.a, lora.b)):
            fill(factor, seed, 0.3)
        kernel = to_numpy(model.layers[0].frozen_kernel)
        model.compile(keras.optimizers.SGD(0.01), "mse", jit_compile=jit)
        model.fit(case.inputs(8), case.targets(8), epochs=3, verbose=0, shuffle=False)
        np.testing.assert_array_equal(kernel, to_numpy(model.layers[0].frozen_kernel))
        outputs = model(case.inputs(8), training=False)
        assert device in outputs.device
        return [to_numpy(outputs), to_numpy(lora.a), to_numpy(lora.b)]


# A GPU and XLA draw other dropout masks than a CPU.
SAME = [case for case in CASES if "dropout" not in case.lora]


@pytest.mark.parametrize("case", SAME, ids=lambda case: case.name)
@pytest.mark.parametrize(
    "dtype, jit, tolerance",
    [("float32", False, 1e-4), ("float32", True, 1e-4), ("mixed_bfloat16", False, 0.1)],
)
def test_same_numbers_as_on_the_cpu(case, dtype, jit, tolerance):
    expected = trained(case, "CPU:0", dtype)
    for found, value in zip(trained(case, DEVICE, dtype, jit), expected, strict=True):
        scale = max(np.abs(value).max(), 1e-3)
        np.testing.assert_allclose(found, value, rtol=0, atol=tolerance * scale)
