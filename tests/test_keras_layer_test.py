"""Keras's own test of a layer: serialization, training, symbolic calls, policies."""

import keras
import numpy as np
import pytest
from keras.src import testing
from layer_cases import (
    CASES,
    DORA,
    KINDS,
    SUBSTITUTED,
    bias_of,
    factors,
    frozen_kernels,
    over,
    slow_but,
)

# A row for each way to compute, for masks, for a seed, and for lengths.
ROWS = [case for case in CASES if case.name in ("embedding-mask", "dense-dropout")]
ROWS += [*KINDS, *SUBSTITUTED, *DORA[:1]]
QUICK = {case.name for case in ROWS} - {"recurrent-gru", "recurrent-lstm"}


@pytest.mark.parametrize("case", slow_but(QUICK, ROWS))
@pytest.mark.filterwarnings("ignore")  # Keras's own test is not free of warnings
def test_run_layer_test(case):
    layer = case.layer()
    data = {}
    if case.vocabulary:
        data["input_data"] = case.inputs()
    else:
        data["input_shape"] = (3, *case.input_shape)
    # Before Keras 3.16 no walk of Keras's enters the adapter, nor that of its test.
    seen = hasattr(keras.Model, "quantization_summary")
    has_bias = bias_of(layer) is not None
    testing.TestCase().run_layer_test(
        case.layer_class,
        init_kwargs={**case.arguments, **case.lora},
        expected_output_shape=layer.compute_output_shape((3, *case.input_shape)),
        expected_num_trainable_weights=len(factors(layer)) + has_bias,
        expected_num_non_trainable_weights=len(layer.loras),
        expected_num_seed_generators=int(
            hasattr(layer, "cell") or (seen and case.lora.get("dropout", 0) > 0)
        ),
        expected_num_losses=0,
        supports_masking=layer.supports_masking,
        **data,
    )


@over(CASES + SUBSTITUTED)
def test_symbolic_call_has_the_shape_of_the_plain_layer(case):
    dtype = "int32" if case.vocabulary else "float32"
    inputs = keras.Input(case.input_shape, dtype=dtype)
    layer = case.layer()
    plain = case.plain_layer(layer, frozen_kernels(layer))
    for training in (True, False, None):
        symbolic = layer(inputs, training=training)
        assert symbolic.shape == plain(inputs).shape
        assert symbolic.dtype == plain(inputs).dtype
    assert np.shape(layer(case.inputs()))[1:] == symbolic.shape[1:]
