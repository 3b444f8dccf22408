"""A penalty on the gradient of the inputs trains A and B, compiled as well as not."""

import keras
import numpy as np
import pytest
from gradients import factors
from layer_cases import CASES, KINDS, SUBSTITUTED, Case, slow_but

import keras_lora

# A compiled step uses W + delta for these, where inputs are large.
OTHERS = ("embedding-rank-2", "conv1d-loralib")
MERGING = [case for case in KINDS if case.name not in OTHERS]
MERGING += [case for case in CASES if case.name == "conv2d-pointwise"]
# And a loop of TensorFlow has another product for these.
MERGING += [case for case in SUBSTITUTED if case.name.startswith("recurrent")]
# Too many filters for the gradient of its kernel to be formed.
MERGING.append(
    Case(
        "conv2d-wide",
        keras_lora.LoRAConv2D,
        {"filters": 37, "kernel_size": 3},
        (7, 6, 5),
        {"rank": 2},
    )
)


# Of the recurrent ones each takes seconds.
QUICK = [case.name for case in MERGING if "recurrent" not in case.name]
QUICK.append("recurrent-simple")


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="what TensorFlow compiles differs"
)
@pytest.mark.parametrize("case", slow_but(QUICK, MERGING))
def test_compiled_second_order_gradients_are_the_eager_ones(case):
    import tensorflow as tf

    layer = case.trained_layer(dtype="float64", dropout=0.0, activation="tanh")
    sources = factors(layer)

    def penalty(x):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch([x, *sources])
                loss = tf.reduce_sum(layer(x, training=True) ** 2)
            # Both of the inputs and of the factors, so that all pairs are mixed.
            first = inner.gradient(loss, [x, *sources])
            total = tf.add_n([tf.reduce_sum(gradient**2) for gradient in first])
        return *first, *outer.gradient(total, [x, *sources])

    x = tf.constant(case.inputs(batch=16, dtype="float64"))
    for lora in layer.loras.values():
        assert tf.size(x) >= (lora.form.merges_from or 0)
    for compiled, eager in zip(tf.function(penalty)(x), penalty(x), strict=True):
        scale = np.abs(eager).max()
        assert scale > 0
        np.testing.assert_allclose(compiled, eager, rtol=0, atol=1e-12 * scale)
