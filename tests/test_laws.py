"""What holds for every kind of layer in every setting."""

import re

import keras
import numpy as np
import pytest
from gradients import gradients
from layer_cases import CASES
from layer_cases import POLICIES
from layer_cases import fill
from layer_cases import merged_kernel
from layer_cases import to_numpy
from shared import assert_close
from shared import assert_equal_bits

import keras_lora
from keras_lora.layers.adapter import LowRankAdapter

over_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
over_policies = pytest.mark.parametrize("policy", POLICIES)


@over_cases
@pytest.mark.parametrize("training", [True, False])
def test_fresh_adapter_changes_nothing(case, training):
    layer = case.layer()
    plain = case.plain_layer(layer, layer.frozen_kernel)
    inputs = case.inputs()
    assert_equal_bits(layer(inputs, training=training), plain(inputs))


@over_cases
def test_training_and_merged_paths_agree(case):
    layer = case.trained_layer(dropout=0.0)
    inputs = case.inputs()
    merged = layer(inputs, training=False)
    assert_close(layer(inputs, training=True), merged)
    fresh = to_numpy(case.plain_layer(layer, layer.frozen_kernel)(inputs))
    assert np.abs(to_numpy(merged) - fresh).max() > 1e-2  # the adapter is seen


@over_cases
def test_plain_layer_with_merged_kernel_equals_inference(case):
    layer = case.trained_layer()
    plain = case.plain_layer(layer, merged_kernel(layer))
    inputs = case.inputs()
    assert_equal_bits(layer(inputs), plain(inputs), case)


@over_cases
def test_unmerged_inference_agrees_with_merged(case):
    layer = case.trained_layer()
    merged = layer(case.inputs())
    layer.merge_weights = False
    assert_close(layer(case.inputs()), merged)


@over_cases
def test_rank_0_is_the_plain_layer(case):
    layer = case.layer(rank=0, alpha=None, dropout=0.0)
    assert layer.lora is None
    plain = case.plain_layer(layer, layer.frozen_kernel)
    assert_equal_bits(layer(case.inputs(), training=True), plain(case.inputs()))
    assert len(layer.trainable_weights) == len(plain.trainable_weights)
    assert layer.count_params() == plain.count_params()


@over_cases
def test_parameters_in_closed_form(case):
    layer = case.layer()
    plain = case.plain_layer(layer, layer.frozen_kernel)
    kernel = int(np.prod(layer.frozen_kernel.shape))
    bias = plain.count_params() - kernel
    trained = sum(int(np.prod(w.shape)) for w in layer.trainable_weights)
    frozen = sum(int(np.prod(w.shape)) for w in layer.non_trainable_weights)
    assert trained == case.factor_parameters + bias
    assert frozen == kernel
    assert layer.count_params() == kernel + bias + case.factor_parameters


@over_cases
def test_summary_counts_in_closed_form(case):
    model = case.model()
    lines = []
    model.summary(print_fn=lines.append)
    found = re.findall(r"(\w+(?:-\w+)? params): ([\d,]+)", "\n".join(lines))
    counts = {what: int(count.replace(",", "")) for what, count in found}
    head = model.layers[-1].count_params()
    layer = model.layers[0]
    kernel = int(np.prod(layer.frozen_kernel.shape))
    bias = 0 if getattr(layer, "bias", None) is None else np.prod(layer.bias.shape)
    assert counts == {
        "Total params": head + kernel + bias + case.factor_parameters,
        "Trainable params": head + bias + case.factor_parameters,
        "Non-trainable params": kernel,
    }


@over_cases
def test_fit_trains_the_factors_and_never_the_kernel(case):
    model = case.model()
    layer = model.layers[0]
    before = to_numpy(layer.frozen_kernel).copy()
    factors = [to_numpy(f).copy() for f in (layer.lora.a, layer.lora.b)]
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=False)
    model.fit(case.inputs(8), case.targets(8), epochs=3, verbose=0)
    assert_equal_bits(layer.frozen_kernel, before)
    for factor, old in zip((layer.lora.a, layer.lora.b), factors, strict=True):
        assert np.abs(to_numpy(factor) - old).max() > 0


@over_cases
def test_toggling_trainable_never_frees_the_kernel(case):
    model = case.model()
    layer = model.layers[0]
    trained = [id(w) for w in model.trainable_weights]
    model.trainable = False
    assert model.trainable_weights == []
    model.trainable = True
    layer.trainable = False
    layer.trainable = True
    assert [id(w) for w in model.trainable_weights] == trained
    assert id(layer.frozen_kernel) not in trained


@over_cases
def test_config_round_trip(case):
    layer = case.layer(name="host")
    config = layer.get_config()
    twin = type(layer).from_config(config)
    assert twin.get_config() == config
    for name in ("rank", "alpha", "scaling", "dropout", "use_rslora"):
        assert getattr(twin.lora, name) == getattr(layer.lora, name)
    assert twin.lora.rank == case.lora.get("rank", 8)
    assert "lora_rank" not in config


@over_cases
def test_dropout_acts_on_the_adapter_alone(case):
    if case.vocabulary:
        pytest.skip("ids cannot be dropped: refused, see test_base_arguments.py")
    layer = case.trained_layer(dropout=0.5)
    inputs = case.inputs()
    first, second = (to_numpy(layer(inputs, training=True)) for _ in range(2))
    assert np.abs(first - second).max() > 0
    assert_equal_bits(layer(inputs), layer(inputs))
    layer.lora.b.assign(np.zeros(layer.lora.b.shape))
    assert_equal_bits(layer(inputs, training=True), layer(inputs, training=True))


@over_cases
@over_policies
def test_adapter_stays_float32_in_every_policy(case, policy):
    layer = case.trained_layer(dtype=policy)
    assert layer.lora.a.dtype == layer.lora.b.dtype == "float32"
    assert layer.frozen_kernel.dtype == ("float32" if "mixed" in policy else policy)
    plain = case.plain_layer(layer, merged_kernel(layer), dtype=policy)
    outputs = layer(case.inputs())
    expected = plain(case.inputs())
    assert outputs.dtype == expected.dtype
    assert_equal_bits(outputs, expected, case if policy == "float32" else None)


@over_cases
@over_policies
def test_merging_rounds_once(case, policy):
    layer = case.trained_layer(dtype=policy)
    kernel = to_numpy(layer.frozen_kernel).astype("float64")
    exact = kernel + to_numpy(layer.lora.delta()).astype("float64")
    rounded = keras.ops.cast(exact.astype("float32"), layer.compute_dtype)
    merged = layer.merged_kernel(layer.compute_dtype)
    assert_equal_bits(merged, rounded)


@over_cases
@over_policies
def test_half_precision_training_keeps_small_updates(case, policy):
    """An update below the last bit of W still reaches the training outputs."""
    if case.vocabulary:
        pytest.skip("no sum that a kernel of ones could make zero")
    if "..." in case.arguments.get("equation", "") and policy in (
        "float16",
        "mixed_float16",
    ):
        pytest.skip("tf.einsum with an ellipsis is wrong in float16, in Keras too")
    plain_activation = {"activation": None} if "activation" in case.arguments else {}
    layer = case.trained_layer(dtype=policy, dropout=0.0, **plain_activation)
    layer.frozen_kernel.assign(np.ones(layer.frozen_kernel.shape))
    layer.lora.b.assign(layer.lora.b * 1e-3)
    if layer.bias is not None:
        layer.bias.assign(np.zeros(layer.bias.shape))
    signs = np.sign(case.inputs(batch=8)) + 0.0
    outputs = to_numpy(layer(signs, training=True))
    exact = case.plain_layer(layer, layer.lora.delta(), **plain_activation)(signs)
    layer.lora.b.assign(np.zeros(layer.lora.b.shape))
    cancelled = to_numpy(layer(signs, training=True)) == 0  # there W adds nothing
    assert cancelled.any()
    assert_close(outputs[cancelled], to_numpy(exact)[cancelled], tolerance=0.02)


@over_cases
def test_float64_policy_gives_a_float64_adapter(case):
    layer = case.layer(dtype="float64")
    assert layer.lora.a.dtype == layer.lora.b.dtype == "float64"


@over_cases
def test_delta_is_scaling_times_the_product(case):
    layer = case.trained_layer()
    delta = to_numpy(layer.lora.delta())
    assert delta.shape == tuple(layer.frozen_kernel.shape)
    alpha = case.lora.get("alpha", layer.lora.rank)
    rank = layer.lora.rank
    power = 0.5 if case.lora.get("use_rslora") else 1.0
    assert layer.lora.scaling == alpha / rank**power
    layer.lora.set_alpha(2 * alpha, layer.lora.use_rslora)
    assert_close(layer.lora.delta(), 2 * delta)


@over_cases
def test_regularizer_acts_on_the_factors(case):
    layer = case.trained_layer()
    name = f"{layer.kernel_name}_regularizer"
    penalized = case.trained_layer(**{name: keras.regularizers.L2(0.5)})
    assert len(penalized.losses) == 2
    factors = [to_numpy(f) for f in (penalized.lora.a, penalized.lora.b)]
    expected = sum(0.5 * (f.astype("float64") ** 2).sum() for f in factors)
    assert_close(sum(to_numpy(loss) for loss in penalized.losses), expected)
    fill(penalized.frozen_kernel, seed=9, scale=100)
    assert_close(sum(to_numpy(loss) for loss in penalized.losses), expected)


@over_cases
def test_starting_values(case):
    layer = case.layer()
    a, b = to_numpy(layer.lora.a), to_numpy(layer.lora.b)
    zero, started = (a, b) if case.vocabulary else (b, a)
    assert (zero == 0).all()
    assert np.unique(started).size > 1
    if not case.vocabulary:
        limit = 1 / np.sqrt(case.fan_in)
        assert np.abs(started).max() <= limit
        assert np.abs(started).max() > 0.5 * limit


def test_adapter_config_round_trip():
    adapter = LowRankAdapter(4, alpha=3, dropout=0.1, use_rslora=True)
    assert LowRankAdapter.from_config(adapter.get_config()).scaling == 1.5


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_one_row_and_rank_1_have_the_gradient_of_rank_2(axes):
    """torch's convolution on a CPU has none for one row and one filter."""
    kind = getattr(keras_lora, f"LoRAConv{axes}D")
    x = np.random.default_rng(0).standard_normal((1, *[5] * axes, 2), "float32")
    found = []
    for rank in (1, 2):
        layer = kind(3, 2, rank=rank, alpha=rank)
        layer.build(x.shape)
        fill(layer.kernel, 1)
        b = np.zeros((rank, 3), "float32")
        b[0] = (0.5, -1.0, 2.0)
        layer.lora.b.assign(b)
        a = np.ones(layer.lora.a.shape, "float32")
        layer.lora.a.assign(a * np.arange(1, rank + 1))
        weights = np.ones(tuple(layer(x).shape), "float32")
        found.append([g[..., :1] for g in gradients(layer, x, weights)])
    assert np.abs(found[0][0]).max() > 0
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
