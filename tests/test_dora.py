"""DoRA: against PEFT on torch run live, against NumPy, and what it promises."""

import inspect

import keras
import ml_dtypes
import numpy as np
import peft
import pytest
import torch
from gradients import gradients
from layer_cases import CASES, DORA, Case, fill, over, slow_but, to_numpy
from test_against_torch import (
    Pair,
    Reference,
    array,
    kernel_to_last,
    over_first_precision,
    over_gradients,
    over_precisions,
)
from test_gradient_sizes import SIZES, formed, merged_kernel, training_step

import keras_lora

on_tensorflow = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="reads TensorFlow's graphs"
)
over_cases = over(DORA)


# Against PEFT.


class Reshaped(torch.nn.Module):
    """A module between other shapes: an einsum layer is a linear one, reshaped."""

    def __init__(self, inner, inputs=None, outputs=None):
        super().__init__()
        self.inner, self.inputs, self.outputs = inner, inputs, outputs

    def forward(self, x):
        x = x if self.inputs is None else x.flatten(-len(self.inputs))
        y = self.inner(x)
        return y if self.outputs is None else y.unflatten(-1, self.outputs)


def adapted_by_peft(base, **settings):
    config = peft.LoraConfig(
        **{"r": 3, "lora_alpha": 5, "target_modules": ["0"], "use_dora": True},
        **settings,
    )
    model = peft.get_peft_model(torch.nn.Sequential(base), config)
    return model.base_model.model[0]


def tensors(module):
    module = getattr(module, "inner", module)
    words = ("lora_A", "lora_B")
    if isinstance(module.base_layer, torch.nn.Embedding):
        found = [module.lora_embedding_A["default"], module.lora_embedding_B["default"]]
    else:
        found = [getattr(module, word)["default"].weight for word in words]
    return module.base_layer.weight, *found


def magnitude_of(module):
    module = getattr(module, "inner", module)
    return module.lora_magnitude_vector["default"].weight


def reference(name, layer, module, input_shape, kernel, **others):
    ours = {"rank": 3, "alpha": 5, "use_dora": True}
    return Reference(
        name,
        layer=lambda dtype: layer(dtype=dtype, **ours),
        module=module,
        input_shape=input_shape,
        kernel=kernel,
        tensors=tensors,
        merge=lambda module: getattr(module, "inner", module).merge(),
        **{"a": np.transpose, "b": np.transpose, **others},
    )


def conv(ndim, kernel_size, **options):
    ours = {
        "padding": "same" if options.get("padding") else "valid",
        "strides": options.get("stride", 1),
    }
    layer = getattr(keras_lora, f"LoRAConv{ndim}D")
    base = getattr(torch.nn, f"Conv{ndim}d")
    return reference(
        f"conv{ndim}d-{kernel_size}",
        lambda **lora: layer(6, kernel_size, **ours, **lora),
        lambda: adapted_by_peft(base(4, 6, kernel_size, **options)),
        (4, *(9, 8, 7)[:ndim]),
        kernel_to_last,
        a=kernel_to_last,
        b=lambda b: b.reshape(b.shape[:2]).T,
        channels_first=True,
    )


def einsum(equation, output_shape, inputs, outputs):
    sizes = inputs + outputs
    rows, columns = np.prod(inputs), np.prod(outputs)
    return reference(
        f"einsum-{equation}",
        lambda **lora: keras_lora.LoRAEinsumDense(equation, output_shape, **lora),
        lambda: Reshaped(
            adapted_by_peft(torch.nn.Linear(rows, columns, bias=False)),
            inputs=inputs if len(inputs) > 1 else None,
            outputs=outputs if len(outputs) > 1 else None,
        ),
        (7, *inputs),
        lambda weight: weight.T.reshape(sizes),
        a=lambda a: a.T.reshape(*inputs, -1),
        b=lambda b: b.T.reshape(-1, *outputs),
    )


REFERENCES = [
    reference(
        "linear",
        lambda **lora: keras_lora.LoRADense(5, **lora),
        lambda: adapted_by_peft(torch.nn.Linear(6, 5)),
        (7, 6),
        np.transpose,
    ),
    reference(
        "embedding",
        lambda **lora: keras_lora.LoRAEmbedding(9, 5, **lora),
        lambda: adapted_by_peft(torch.nn.Embedding(9, 5)),
        (7,),
        lambda weight: weight,
        vocabulary=9,
    ),
    einsum("abc,cde->abde", (7, 3, 4), (6,), (3, 4)),
    einsum("abcd,cde->abe", (7, 5), (3, 4), (5,)),
    conv(1, 3, padding=1),
    conv(2, (3, 5)),
    conv(2, 1, stride=2),
    conv(3, 2, stride=(1, 2, 1)),
]
over_references = pytest.mark.parametrize(
    "reference", REFERENCES, ids=lambda reference: reference.name
)


class DoRAPair(Pair):
    """The same with m, which is not what the norm is."""

    def __init__(self, reference, dtype):
        super().__init__(reference, dtype)
        self.m = magnitude_of(self.module)
        with torch.no_grad():
            self.m.copy_(torch.rand(self.m.shape) + 0.5)
        self.layer.lora.magnitude.assign(self.our_m(self.m))

    def our_m(self, tensor):
        return array(tensor).reshape(self.layer.lora.magnitude.shape)

    def their_gradients(self):
        of_inputs = not self.reference.vocabulary
        x = torch.tensor(self.x, requires_grad=of_inputs)
        loss = (self.theirs(x) * torch.tensor(self.weights)).sum()
        sources = [self.a, self.b, self.m] + [x] * of_inputs
        a, b, m, *of_x = torch.autograd.grad(loss, sources)
        ours = [self.reference.a(array(a)), self.reference.b(array(b)), self.our_m(m)]
        return ours + [self.to_ours(array(of) * 1.0) for of in of_x]


def assert_close(ours, theirs, tolerance=1e-5):
    ours, theirs = to_numpy(ours), to_numpy(theirs)
    scale = np.abs(theirs).max()
    assert scale > 0
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * scale)


@over_references
@over_precisions
def test_forward_is_that_of_peft(reference, dtype, tolerance):
    pair = DoRAPair(reference, dtype)
    expected = pair.to_ours(array(pair.theirs()))
    assert_close(pair.ours(training=True), expected, tolerance)
    assert_close(pair.ours(training=False), expected, tolerance)
    reference.merge(pair.module)
    expected = pair.to_ours(array(pair.theirs()))
    assert_close(pair.ours(training=False), expected, tolerance)


@over_references
@over_precisions
def test_start_is_that_of_peft(reference, dtype, tolerance):
    """||W + scaling * A @ B||, here with factors of which neither is zero."""
    pair = Pair(reference, dtype)
    module = getattr(pair.module, "inner", pair.module)
    module.lora_magnitude_vector["default"].update_layer(
        base_layer=module.base_layer, lora_A=pair.a, lora_B=pair.b, scaling=5 / 3
    )
    pair.layer.lora.start_from_kernel()
    found = to_numpy(pair.layer.lora.magnitude)
    expected = array(magnitude_of(pair.module)).reshape(found.shape)
    assert_close(found, expected, tolerance)


@over_references
@over_gradients
def test_gradients_are_those_of_peft(reference, dtype, tolerance, compiled):
    pair = DoRAPair(reference, dtype)
    ours, theirs = pair.our_gradients(True, compiled), pair.their_gradients()
    for our_gradient, their_gradient in zip(ours, theirs, strict=True):
        assert_close(our_gradient, their_gradient, tolerance)


@over_references
@over_first_precision
def test_optimizer_steps_are_those_of_peft(reference, dtype, tolerance):
    pair = DoRAPair(reference, dtype)
    factors = list(pair.layer.lora.named_factors().values())
    # Rates that float32 holds exactly: Keras keeps them in floatx.
    optimizer = keras.optimizers.SGD(2.0**-8, momentum=0.5)
    theirs = [pair.a, pair.b, pair.m]
    their_optimizer = torch.optim.SGD(theirs, 2.0**-8, momentum=0.5)
    before = array(pair.m)
    for _ in range(4):
        found = pair.our_gradients()[:3]
        optimizer.apply([keras.ops.convert_to_tensor(g) for g in found], factors)
        their_optimizer.zero_grad()
        (pair.theirs() * torch.tensor(pair.weights)).sum().backward()
        their_optimizer.step()
    assert np.abs(array(pair.m) - before).max() > 1e-2
    for ours, expected in zip(
        factors,
        (reference.a(array(pair.a)), reference.b(array(pair.b)), pair.our_m(pair.m)),
        strict=True,
    ):
        assert_close(ours, expected, tolerance)
    expected = pair.to_ours(array(pair.theirs()))
    assert_close(pair.ours(training=True), expected, tolerance)


class Mask(torch.nn.Module):
    """Dropout whose mask both frameworks know."""

    def __init__(self, shape):
        super().__init__()
        random = np.random.default_rng(8)
        self.mask = random.integers(0, 2, shape) * 2.0

    def forward(self, x):
        return x * torch.tensor(self.mask)


@pytest.mark.parametrize(
    "reference",
    [r for r in REFERENCES if not (r.vocabulary or "einsum" in r.name)],
    ids=lambda reference: reference.name,
)
@over_precisions
def test_dropout_is_that_of_peft(reference, dtype, tolerance):
    """It acts on the inputs of A and of m / n - 1, by one mask."""
    pair = DoRAPair(reference, dtype)
    dropout = Mask(pair.x.shape)
    pair.module.train()
    pair.module.lora_dropout["default"] = dropout
    drawn = []

    def dropped(inputs):
        drawn.append(inputs)
        return keras.ops.multiply(inputs, pair.to_ours(dropout.mask))

    pair.layer.lora.dropout, pair.layer.lora.apply_dropout = 0.5, dropped
    outputs = pair.ours(training=True)
    assert len(drawn) == 1
    assert_close(outputs, pair.to_ours(array(pair.theirs())), tolerance)
    for ours, theirs in zip(pair.our_gradients(), pair.their_gradients(), strict=True):
        assert_close(ours, theirs, tolerance)


# Against NumPy, for every kind: W' in float64, and LoRA's own gradients.


def gain(layer):
    """m / n in float64 for all of the kernel's outputs, 1 where none is adapted."""
    kernel, delta, m = (
        to_numpy(x).astype("float64")
        for x in (layer.frozen_kernel, layer.lora.delta(), layer.lora.magnitude)
    )
    norm = np.sqrt(((kernel + delta) ** 2).sum(layer.form.input_axes))
    slices = getattr(layer, "adapted_slices", (True,))
    if all(slices):
        return m / norm
    rows = norm.reshape(len(slices), -1)
    found, rest = np.ones_like(rows), iter(m.reshape(sum(slices), -1))
    for row, adapted in enumerate(slices):
        if adapted:
            found[row] = next(rest) / rows[row]
    return found.reshape(norm.shape)


def exact_kernel(layer):
    kernel = to_numpy(layer.frozen_kernel).astype("float64")
    values = gain(layer)
    for axis in sorted(layer.form.input_axes):
        values = np.expand_dims(values, axis)
    return (kernel + to_numpy(layer.lora.delta()).astype("float64")) * values


@over_cases
def test_outputs_are_those_of_the_plain_layer_with_numpys_kernel(case):
    layer = case.trained_layer(dropout=0.0)
    plain = case.plain_layer(layer, exact_kernel(layer).astype("float32"))
    inputs = case.inputs()
    for training in (True, False):
        assert_close(layer(inputs, training=training), plain(inputs))
    base = case.plain_layer(layer, layer.frozen_kernel)
    assert np.abs(to_numpy(plain(inputs)) - to_numpy(base(inputs))).max() > 1e-2


@over_cases
def test_gradients_are_those_of_lora_times_the_gain(case):
    """dA, dB and dx of LoRA with upstream * m / n; dm = sum(upstream * y) / n."""
    linear = {} if case.vocabulary else {"use_bias": False, "activation": None}
    if "equation" in case.arguments:
        linear = {"bias_axes": None, "activation": None}
    layer = case.trained_layer(dropout=0.0, **linear)
    lora = case.layer(dropout=0.0, use_dora=False, **linear)
    lora.frozen_kernel.assign(layer.frozen_kernel)
    lora.lora.a.assign(layer.lora.a)
    lora.lora.b.assign(layer.lora.b)
    inputs = case.inputs()
    outputs = to_numpy(lora(inputs, training=True))
    weights = np.random.default_rng(3).standard_normal(outputs.shape)
    scale = to_numpy(layer.form.over_outputs(gain(layer)))
    a, b, m, *x = gradients(layer, inputs, weights.astype("float32"))
    upstream = (weights * scale).astype("float32")
    of_lora = gradients(lora, inputs, upstream)
    for ours, expected in zip((a, b, *x), of_lora, strict=True):
        assert_close(ours, expected)
    products = weights * outputs * scale
    scale = np.broadcast_to(scale, outputs.shape)
    # What m is multiplied with, summed over all that is not one of its axes.
    for index in np.ndindex(*m.shape):
        moved = to_numpy(layer.lora.magnitude)
        moved[index] = 0
        other = gain_with(layer, moved)
        share = (products * (other != scale)).sum()
        value = to_numpy(layer.lora.magnitude)[index]
        np.testing.assert_allclose(m[index], share / value, rtol=2e-4, atol=1e-4)


def gain_with(layer, magnitude):
    """The gain over the outputs, with another m."""
    before = to_numpy(layer.lora.magnitude)
    layer.lora.magnitude.assign(magnitude)
    found = to_numpy(layer.form.over_outputs(gain(layer)))
    layer.lora.magnitude.assign(before)
    return found


def reversible(**overrides):
    layer = keras_lora.layers.reversible_embedding.LoRAReversibleEmbedding(
        9, 5, rank=2, alpha=3, use_dora=True, **overrides
    )
    layer.build()
    for seed, variable in enumerate(layer.lora.named_factors().values()):
        fill(variable, seed)
    return layer


@pytest.mark.skipif(
    not hasattr(keras.layers, "ReversibleEmbedding"), reason="since Keras 3.13"
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"logit_soft_cap": 3.0}], ids=str)
def test_tied_embedding_in_both_directions(training, options):
    layer = reversible(**options)
    kernel = exact_kernel(layer)
    ids = np.array([[1, 8, 1], [0, 3, 4]], "int32")
    x = np.random.default_rng(2).standard_normal((2, 3, 5)).astype("float32")
    assert_close(layer(ids, training=training), kernel[ids])
    logits = x @ kernel.T
    if options:
        logits = np.tanh(logits / 3) * 3
    assert_close(layer(x, reverse=True, training=training), logits)


# What it promises.


@over_cases
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "float16"])
def test_merging_rounds_once(case, policy):
    layer = case.trained_layer(dtype=policy)
    dtype = keras.backend.standardize_dtype(layer.compute_dtype)
    exact = exact_kernel(layer).astype("float32")
    merged = to_numpy(layer.merged_kernel(dtype))
    # float32's last bits may fall on either side of a rounding.
    near = [(exact * f).astype(dtype) for f in (1 - 1e-5, 1 + 1e-5)]
    low, high = (np.minimum(*near), np.maximum(*near))
    assert (low.astype("float32") <= merged).all()
    assert (merged <= high.astype("float32")).all()


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "bfloat16"])
def test_half_precision_multiplies_in_float32(policy):
    """A gain that half precision cannot hold moves the outputs as it should."""
    dtype = policy.removeprefix("mixed_")
    layer = keras_lora.LoRADense(7, rank=2, use_bias=False, dtype=policy, use_dora=True)
    layer.build((None, 64))
    # Squares of these are infinite in float16.
    layer.frozen_kernel.assign(layer.frozen_kernel * 0 + 300.0)
    layer.lora.start_from_kernel()
    gain = np.linspace(0.97, 1.03, 7)
    layer.lora.magnitude.assign(to_numpy(layer.lora.magnitude) * gain)
    x = np.random.default_rng(1).random((500, 64)) / 10
    plain = keras.layers.Dense(7, use_bias=False, dtype=policy)
    plain.build((None, 64))
    plain.kernel.assign(layer.frozen_kernel)
    x = x.astype("float32")
    rounded = getattr(ml_dtypes, dtype, getattr(np, dtype, None))
    expected = (to_numpy(plain(x)) * gain).astype("float32")
    near = [(expected * f).astype(rounded) for f in (1 - 1e-6, 1 + 1e-6)]
    found = to_numpy(layer(x, training=True))
    assert np.isfinite(found).all()
    assert (near[0].astype("float32") <= found).all()
    assert (found <= near[1].astype("float32")).all()


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="has no XLA")
@pytest.mark.parametrize(
    "name",
    slow_but(["dense-dropout"], ["dense-dropout", "conv2d-plain", "embedding-mask"]),
)
def test_steps_under_xla_are_those_without(name):
    case = next(case for case in CASES if case.name == name)
    models = [case.model(use_dora=True, dropout=0.0) for _ in range(2)]
    models[1].set_weights(models[0].get_weights())
    for model, jit_compile in zip(models, (True, False), strict=True):
        model.compile(keras.optimizers.SGD(0.05), "mse", jit_compile=jit_compile)
        model.fit(case.inputs(8), case.targets(8), epochs=3, verbose=0)
    for ours, expected in zip(*(model.weights for model in models), strict=True):
        np.testing.assert_allclose(to_numpy(ours), to_numpy(expected), atol=1e-5)


@on_tensorflow
@pytest.mark.parametrize("name", ["dense-relu", "embedding-rank-2", "conv2d-groups"])
def test_export(name, tmp_path):
    import tensorflow as tf

    case = next(case for case in CASES if case.name == name)
    model = case.model(use_dora=True)
    for seed, variable in enumerate(model.layers[0].lora.named_factors().values()):
        fill(variable, seed)
    keras_lora.export(model, tmp_path / "served")
    artifact = tf.saved_model.load(str(tmp_path / "served"))
    assert_close(artifact.serve(case.inputs()), model(case.inputs()), 1e-6)


@over_cases
def test_zero_columns_are_left_alone(case):
    """Where W and the update are zero there is nothing that m could scale."""
    layer = case.layer(dropout=0.0)
    layer.frozen_kernel.assign(np.zeros(layer.frozen_kernel.shape))
    layer.lora.start_from_kernel()
    for training in (True, False):
        found = layer(case.inputs(), training=training)
        plain = case.plain_layer(layer, layer.frozen_kernel)
        np.testing.assert_array_equal(to_numpy(found), to_numpy(plain(case.inputs())))
    weights = np.ones(to_numpy(found).shape, "float32")
    for gradient in gradients(layer, case.inputs(), weights):
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("as_list", [True, False])
def test_embedding_that_is_given_its_table(as_list):
    table = np.random.default_rng(1).standard_normal((9, 5)).astype("float32") * 4
    weights = [table] if as_list else table
    layer = keras_lora.LoRAEmbedding(9, 5, weights=weights, rank=2, use_dora=True)
    assert_close(layer.lora.magnitude, np.linalg.norm(table, axis=0))
    ids = np.arange(9)
    np.testing.assert_array_equal(to_numpy(layer(ids)), table)


def test_where_the_argument_stands():
    for layer_class in (keras_lora.LoRADense, keras_lora.LoRAConv2D):
        assert inspect.signature(layer_class).parameters["use_dora"].default is False
        assert "use_dora" in layer_class.__doc__
    assert inspect.signature(keras_lora.apply_lora).parameters["use_dora"]
    layer = keras_lora.LoRADense(5, rank=2)
    layer.build((None, 4))
    assert layer.lora.magnitude is None
    assert layer.get_config().get("use_dora", False) is False


def test_apply_lora():
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 3, activation="relu", name="conv")(inputs)
    x = keras.layers.Flatten()(x)
    x = keras.layers.Dense(6, activation="relu", name="dense")(x)
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(x))
    images = np.random.default_rng(1).standard_normal((4, 8, 8, 3)).astype("float32")
    before = to_numpy(model(images))
    report = keras_lora.apply_lora(model, rank=2, use_dora=True)
    np.testing.assert_array_equal(to_numpy(model(images)), before)
    assert [row.path for row in report] == ["conv", "dense"]
    assert report[0].parameters == 2 * (27 + 4) + 4
    assert model.get_layer("dense").lora.magnitude.shape == (6,)
    model.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=False)
    model.fit(images, np.ones((4, 2)), epochs=2, verbose=0)
    assert np.abs(to_numpy(model(images)) - before).max() > 1e-3


def test_what_has_no_norm_is_refused():
    layer = keras_lora.LoRAConv2D(4, 3, rank=2, factorization="loralib", use_dora=True)
    with pytest.raises(ValueError, match='use factorization="standard"'):
        layer.build((None, 8, 8, 3))


@on_tensorflow
def test_building_inside_an_xla_function_is_refused():
    model = keras.Sequential([keras_lora.LoRADense(4, rank=2, use_dora=True)])
    model.compile("sgd", "mse", jit_compile=True)
    with pytest.raises(ValueError, match="Build the model first"):
        model.fit(np.ones((4, 3)), np.ones((4, 4)), verbose=0)


@pytest.mark.parametrize("jit_compile", [False, "auto"])
def test_a_model_that_fit_builds(jit_compile):
    layer = keras_lora.LoRADense(4, rank=2, use_dora=True)
    model = keras.Sequential([layer])
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=jit_compile)
    model.fit(np.ones((4, 3)), np.ones((4, 4)), verbose=0)
    norm = np.linalg.norm(to_numpy(layer.frozen_kernel), axis=0)
    assert_close(layer.lora.magnitude, norm, 1e-6)


@on_tensorflow
@pytest.mark.parametrize("case", SIZES, ids=lambda case: case.name)
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_step_forms_nothing_of_the_kernels_size(case: Case, policy):
    """But the squares of W, for ||W||, which depend on no inputs."""
    layer = case.trained_layer(use_dora=True, dtype=policy)
    size = int(np.prod(layer.frozen_kernel.shape))
    found = formed(list(training_step(layer, case.inputs(batch=2))), size)
    assert [op for op in found if op.of_inputs] == []
    expected = [*merged_kernel(case, policy), "Square"]
    assert sorted(op.kind for op in found) == sorted(expected)
