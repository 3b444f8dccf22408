"""What holds for every kind of layer in every setting, and for both methods."""

import inspect
import re

import keras
import numpy as np
import pytest
from gradients import gradients
from layer_cases import (
    CASES,
    DORA,
    EVERY,
    KINDS,
    POLICIES,
    SUBSTITUTED,
    bias_of,
    deltas,
    factors,
    fill,
    frozen_kernels,
    merged_kernels,
    over,
    sites,
    to_numpy,
)
from shared import EAGERLY, assert_close, assert_equal_bits, losses

import keras_lora
from keras_lora.layers.adapter import LowRankAdapter

over_cases = over(EVERY + DORA)
over_lora = over(EVERY)
over_kinds = over(KINDS + SUBSTITUTED[1:2])
over_policies = pytest.mark.parametrize("policy", POLICIES)


@over_cases
def test_fresh_adapter_changes_nothing(case, policy="float32"):
    layer = case.layer(dtype=policy)
    plain = case.plain_layer(layer, frozen_kernels(layer), dtype=policy)
    inputs = case.inputs()
    for training in (True, False):
        assert_equal_bits(layer(inputs, training=training), plain(inputs))


@over(KINDS + SUBSTITUTED[1:2] + DORA)
def test_fresh_adapter_changes_nothing_in_half_precision(case):
    test_fresh_adapter_changes_nothing(case, "mixed_bfloat16")


def plain_values(case):
    """Random weights for the plain layer of a case, in the order of its own."""
    random = np.random.default_rng(5)
    weights = case.plain_layer(case.layer(), {}).get_weights()
    return [random.standard_normal(w.shape).astype("float32") for w in weights]


@over_cases
def test_a_fresh_layer_takes_the_weights_of_the_plain_one(case):
    layer, inputs = case.layer(), case.inputs()
    plain = case.plain_layer(layer, {})
    plain.set_weights(plain_values(case))
    layer.set_weights(plain.get_weights())
    for training in (True, False):
        assert_equal_bits(layer(inputs, training=training), plain(inputs))


@over_cases
def test_weights_of_the_plain_layer_leave_the_adapter_alone(case):
    layer = case.trained_layer()
    before = {name: to_numpy(factor) for name, factor in factors(layer).items()}
    values = plain_values(case)
    wrong = [*values[:-1], np.zeros((*values[-1].shape, 2))]
    kernels = {name: to_numpy(w) for name, w in frozen_kernels(layer).items()}
    with pytest.raises(ValueError, match="Give the weights of a plain layer"):
        layer.set_weights(wrong)
    for name, kernel in frozen_kernels(layer).items():
        np.testing.assert_array_equal(to_numpy(kernel), kernels[name])
    layer.set_weights(values)
    for name, factor in factors(layer).items():
        np.testing.assert_array_equal(to_numpy(factor), before[name])
    plain = case.plain_layer(layer, {})
    plain.set_weights(values)
    assert_equal_bits(
        case.plain_layer(layer, frozen_kernels(layer))(case.inputs()),
        plain(case.inputs()),
    )


@over_cases
def test_training_and_merged_paths_agree(case):
    layer = case.trained_layer(dropout=0.0)
    inputs = case.inputs()
    merged = layer(inputs, training=False)
    assert_close(layer(inputs, training=True), merged)
    fresh = to_numpy(case.plain_layer(layer, frozen_kernels(layer))(inputs))
    assert np.abs(to_numpy(merged) - fresh).max() > 1e-2  # the adapter is seen


@over_cases
def test_plain_layer_with_merged_kernel_equals_inference(case):
    layer = case.trained_layer()
    plain = case.plain_layer(layer, merged_kernels(layer))
    inputs = case.inputs()
    assert_equal_bits(layer(inputs), plain(inputs), case)


@over_cases
def test_unmerged_inference_agrees_with_merged(case):
    layer = case.trained_layer()
    merged = layer(case.inputs())
    layer.merge_weights = False
    assert_close(layer(case.inputs()), merged)


@over_lora
def test_rank_0_is_the_plain_layer(case):
    layer = case.layer(rank=0, alpha=None, dropout=0.0)
    assert layer.lora is None
    assert layer.loras == {}
    plain = case.plain_layer(layer, frozen_kernels(layer))
    assert_equal_bits(layer(case.inputs(), training=True), plain(case.inputs()))
    assert len(layer.trainable_weights) == len(plain.trainable_weights)
    assert layer.count_params() == plain.count_params()


@over_cases
def test_parameters_in_closed_form(case):
    layer = case.layer()
    plain = case.plain_layer(layer, frozen_kernels(layer))
    kernel = sum(int(np.prod(w.shape)) for w in frozen_kernels(layer).values())
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
    kernel = sum(int(np.prod(w.shape)) for w in frozen_kernels(layer).values())
    bias = 0 if bias_of(layer) is None else np.prod(bias_of(layer).shape)
    assert counts == {
        "Total params": head + kernel + bias + case.factor_parameters,
        "Trainable params": head + bias + case.factor_parameters,
        "Non-trainable params": kernel,
    }


# These are traced, and the others run eagerly.
TRACED = [*KINDS[::2], *DORA[::4]]
TRACED += [case for case in CASES if case.name == "conv2d-groups"]


@over_cases
def test_fit_trains_the_factors_and_never_the_kernel(case):
    model = case.model()
    layer = model.layers[0]
    before = {name: to_numpy(w) for name, w in frozen_kernels(layer).items()}
    started = {name: to_numpy(factor) for name, factor in factors(layer).items()}
    how = {"jit_compile": False} if case in TRACED else EAGERLY
    model.compile(keras.optimizers.SGD(0.1), "mse", **how)
    losses(model, case.inputs(8), case.targets(8), epochs=3)
    for name, kernel in frozen_kernels(layer).items():
        assert_equal_bits(kernel, before[name])
    for name, factor in factors(layer).items():
        moved = np.abs(to_numpy(factor) - started[name]).max()
        assert 0 < moved < np.inf, name


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
    assert not set(map(id, frozen_kernels(layer).values())) & set(trained)


@over_cases
def test_config_round_trip(case):
    layer = case.layer(name="host")
    config = layer.get_config()
    twin = type(layer).from_config(config)
    assert twin.get_config() == config
    assert twin.loras.keys() == layer.loras.keys() == frozen_kernels(layer).keys()
    for weight, lora in layer.loras.items():
        assert type(twin.loras[weight]) is type(lora)
        assert (lora.magnitude is None) == (not case.lengths)
        for name in ("rank", "alpha", "scaling", "dropout", "use_rslora"):
            assert getattr(twin.loras[weight], name) == getattr(lora, name)
        assert lora.rank == case.lora.get("rank", 8)
    assert "lora_rank" not in config


# Ids cannot be dropped: refused, see test_base_arguments.py.
@over([case for case in CASES if case.drops])
def test_dropout_acts_on_the_adapter_alone(case):
    layer = case.trained_layer(dropout=0.5)
    inputs = case.inputs()
    first, second = (to_numpy(layer(inputs, training=True)) for _ in range(2))
    assert np.abs(first - second).max() > 0
    assert_equal_bits(layer(inputs), layer(inputs))
    layer.lora.b.assign(np.zeros(layer.lora.b.shape))
    assert_equal_bits(layer(inputs, training=True), layer(inputs, training=True))


@over(KINDS + SUBSTITUTED[1:2] + DORA)
@over_policies
def test_adapter_stays_float32_in_every_policy(case, policy):
    layer = case.trained_layer(dtype=policy)
    assert {f.dtype for f in factors(layer).values()} == {"float32"}
    stored = "float32" if "mixed" in policy else policy
    assert {w.dtype for w in frozen_kernels(layer).values()} == {stored}
    plain = case.plain_layer(layer, merged_kernels(layer), dtype=policy)
    outputs = layer(case.inputs())
    expected = plain(case.inputs())
    assert outputs.dtype == expected.dtype
    assert_equal_bits(outputs, expected, case if policy == "float32" else None)


@over_kinds
@over_policies
def test_merging_rounds_once(case, policy):
    layer = case.trained_layer(dtype=policy)
    for site in sites(layer):
        kernel = to_numpy(site.frozen_kernel).astype("float64")
        exact = kernel + to_numpy(site.lora.delta()).astype("float64")
        rounded = keras.ops.cast(exact.astype("float32"), layer.compute_dtype)
        assert_equal_bits(site.merged_kernel(layer.compute_dtype), rounded)


# With ids there is no sum that a kernel of ones could make zero.
@over([case for case in KINDS if case.drops])
@over_policies
def test_half_precision_training_keeps_small_updates(case, policy):
    """An update below the last bit of W still reaches the training outputs."""
    plain_activation = {"activation": None} if "activation" in case.arguments else {}
    layer = case.trained_layer(dtype=policy, dropout=0.0, **plain_activation)
    layer.frozen_kernel.assign(np.ones(layer.frozen_kernel.shape))
    layer.lora.b.assign(layer.lora.b * 1e-3)
    if layer.bias is not None:
        layer.bias.assign(np.zeros(layer.bias.shape))
    signs = np.sign(case.inputs(batch=8)) + 0.0
    outputs = to_numpy(layer(signs, training=True))
    exact = case.plain_layer(layer, deltas(layer), **plain_activation)(signs)
    layer.lora.b.assign(np.zeros(layer.lora.b.shape))
    cancelled = to_numpy(layer(signs, training=True)) == 0  # there W adds nothing
    assert cancelled.any()
    assert_close(outputs[cancelled], to_numpy(exact)[cancelled], tolerance=0.02)


@over_cases
def test_float64_policy_gives_a_float64_adapter(case):
    layer = case.layer(dtype="float64")
    assert {f.dtype for f in factors(layer).values()} == {"float64"}


@over_cases
def test_delta_is_scaling_times_the_product(case):
    for site in sites(case.trained_layer()):
        lora, delta = site.lora, to_numpy(site.lora.delta())
        assert delta.shape == tuple(site.frozen_kernel.shape)
        alpha = case.lora.get("alpha", lora.rank)
        power = 0.5 if case.lora.get("use_rslora") else 1.0
        assert lora.scaling == alpha / lora.rank**power
        lora.set_alpha(2 * alpha, lora.use_rslora)
        assert_close(lora.delta(), 2 * delta)


BESIDE = ("bias", "activity", "reverse")  # what Keras regularizes beside kernels


@over_cases
def test_regularizer_acts_on_the_factors(case):
    names = [
        name
        for name in inspect.signature(case.layer_class.plain_class).parameters
        if name.endswith("_regularizer") and name.split("_")[0] not in BESIDE
    ]
    arguments = dict.fromkeys(names, keras.regularizers.L2(0.5))
    penalized = case.trained_layer(**arguments)
    pairs = [(lora.a, lora.b) for lora in penalized.loras.values()]
    assert len(penalized.losses) == 2 * len(pairs)
    values = [to_numpy(factor).astype("float64") for pair in pairs for factor in pair]
    expected = sum(0.5 * (value**2).sum() for value in values)
    assert_close(sum(to_numpy(loss) for loss in penalized.losses), expected)
    for kernel in frozen_kernels(penalized).values():
        fill(kernel, seed=9, scale=100)
    assert_close(sum(to_numpy(loss) for loss in penalized.losses), expected)


@over_cases
def test_starting_values(case):
    for weight, lora in case.layer().loras.items():
        a, b = to_numpy(lora.a), to_numpy(lora.b)
        zero, started = (a, b) if case.vocabulary else (b, a)
        assert (zero == 0).all()
        assert np.unique(started).size > 1
        if not case.vocabulary:
            several = isinstance(case.fan_in, dict)
            limit = 1 / np.sqrt(case.fan_in[weight] if several else case.fan_in)
            assert np.abs(started).max() <= limit
            assert np.abs(started).max() > 0.5 * limit


@over_cases
def test_contexts_and_merging(case):
    model, close = case.model(), case if case.substituted else None
    layer, inputs = model.layers[0], case.inputs()
    base = to_numpy(model(inputs))
    for seed, factor in enumerate(factors(layer).values()):
        fill(factor, seed, 0.5)
    expected = to_numpy(model(inputs))
    assert np.abs(expected - base).max() > 1e-2
    with keras_lora.disabled(model):
        assert_equal_bits(model(inputs), base, close)
        for lora in layer.loras.values():
            lora.dropout = 0.0
        assert_equal_bits(model(inputs, training=True), base, close)
    with keras_lora.merged(model):
        assert_close(model(inputs), expected, 1e-6)
        with keras_lora.disabled(model):
            assert_equal_bits(model(inputs), base, close)
    keras_lora.merge_lora(model)
    assert not isinstance(layer, keras_lora.LoRALayer)
    assert_close(model(inputs), expected, 1e-6)


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
