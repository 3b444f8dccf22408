"""Adapters over kernels that Keras has quantized.

The measure is NumPy in float64: W unpacked and dequantized by hand from the layer's
variables. What Keras's own operation does with it is taken from the plain layer.
"""

import contextlib
import threading
import warnings
from dataclasses import dataclass

import keras
import numpy as np
import pytest
import shared
from gradients import gradients
from layer_cases import fill, slow_but, to_numpy
from seeds import set_seed

import keras_lora
from keras_lora.models.sites import adapted_sites

# Of int4 where the first axis is not summed over; a test of its own asks for it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The int4 kernel of"),
    # Two samples are enough to see how a kernel lies.
    pytest.mark.filterwarnings("ignore:.*undersampled"),
    # Keras 3.16 has one warning for all layers that it passes by.
    pytest.mark.filterwarnings("ignore:.*skipped"),
    # Keras transposes a scale of one axis.
    pytest.mark.filterwarnings("ignore:[\\s\\S]*The use of `x.T`"),
    pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize`"),
    # jax2tf's own parameter, which Keras passes.
    pytest.mark.filterwarnings("ignore:The `native_serialization`"),
]
# Keras 3.12 has one way for each mode: inputs quantized, a scale for each output.
EARLIER = not hasattr(keras.quantizers, "Int8QuantizationConfig")
LATER = hasattr(keras.Model, "quantization_summary")  # Keras 3.16
if EARLIER:
    MODES = {"int8": lambda: None, "int4": lambda: None}
else:
    Int8 = keras.quantizers.Int8QuantizationConfig
    Int4 = keras.quantizers.Int4QuantizationConfig
    MODES = {
        "int8": lambda: Int8(),
        "int8 weights": lambda: Int8(activation_quantizer=None),
        "int4 blocks": lambda: Int4(block_size=2),
        "int4": lambda: Int4(block_size=None),
    }
over_blocks = pytest.mark.skipif(EARLIER, reason="Keras 3.12 has no int4 in blocks")
over_samples = pytest.mark.skipif(
    EARLIER, reason="Keras 3.12 has no AWQ, and GPTQ for models of its own kind alone"
)


SAMPLES = {"dataset": [np.arange(8)], "tokenizer": len, "sequence_length": 2}
CALIBRATED = {
    "gptq": lambda: keras.quantizers.GPTQConfig(**SAMPLES, num_samples=2, group_size=4),
    "gptq 8 bits": lambda: keras.quantizers.GPTQConfig(
        **SAMPLES, num_samples=2, group_size=-1, weight_bits=8
    ),
    "awq": lambda: keras.quantizers.AWQConfig(
        **SAMPLES, num_samples=2, group_size=4, num_grid_points=2
    ),
}
if EARLIER:
    CALIBRATED = {}


def kind_of(mode):
    """What Keras calls a mode."""
    return mode.split()[0]


def quantize(layer, mode, host=None):
    """As Keras does it, calibrated with a host's inputs."""
    config = {**MODES, **CALIBRATED}[mode]()
    if mode in MODES:
        layer.quantize(kind_of(mode), config=config)
        return
    model = keras.Sequential([keras.Input(host.input_shape), layer])
    samples = host.inputs()
    structure = {
        "pre_block_layers": [lambda tokens: keras.ops.convert_to_tensor(samples)],
        "sequential_blocks": [layer],
    }
    # In the configuration, Keras 3.15 would look for an end of it when it saves.
    model.get_quantization_layer_structure = lambda mode: structure
    model.quantize(config.mode, config=config)
    # Keras 3.15 calibrates as if there were no samples. These come of samples.
    random = np.random.default_rng(6)
    layer.g_idx.assign(random.permutation(to_numpy(layer.g_idx)))
    if config.mode == "awq":
        layer.awq_scales.assign(random.uniform(0.5, 2, layer.awq_scales.shape))


@dataclass(frozen=True)
class Host:
    """A layer that Keras quantizes, and how its kernel maps inputs to outputs."""

    make: object  # a function of further arguments
    input_shape: tuple
    equation: str
    vocabulary: int = 0
    kernel_name: str = "kernel"

    def inputs(self, batch=6, seed=1):
        random = np.random.default_rng(seed)
        shape = (batch, *self.input_shape)
        if self.vocabulary:
            return random.integers(0, self.vocabulary, shape).astype("int32")
        return random.standard_normal(shape).astype("float32")

    def as_floats(self, inputs):
        """What the equation multiplies: ids as rows of the unit matrix."""
        inputs = np.eye(self.vocabulary)[inputs] if self.vocabulary else inputs
        return inputs.astype("float64")

    def quantized(self, mode, bias=True, **arguments):
        layer = self.make(name="host", **arguments)
        layer.build((None, *self.input_shape))
        if layer_bias(layer) is not None and bias:
            fill(layer.bias, seed=5)
        quantize(layer, mode, self)
        return layer

    def apply(self, layer, **settings):
        dtype = "int32" if self.vocabulary else "float32"
        model = keras.Sequential([keras.Input(self.input_shape, dtype=dtype), layer])
        keras_lora.apply_lora(model, rank=3, target=["host"], **settings)

    def adapted(self, mode, trained=True, **arguments):
        layer = self.quantized(mode, **arguments)
        self.apply(layer, alpha=6)
        if trained:
            fill(layer.lora.a, 8, scale=0.3)
            fill(layer.lora.b, 9, scale=0.3)
        return layer


def dense(**more):
    return keras.layers.Dense(5, **more)


def einsum(equation, output_shape, bias_axes):
    def make(use_bias=True, **more):
        axes = bias_axes if use_bias else None
        return keras.layers.EinsumDense(equation, output_shape, bias_axes=axes, **more)

    return make


def embedding(use_bias=None, activation=None, **more):
    return keras.layers.Embedding(9, 5, **more)


HOSTS = {
    "dense": Host(dense, (7,), "ab,bc->ac"),
    "query": Host(einsum("abc,cde->abde", (4, 3, 5), "de"), (4, 6), "abc,cde->abde"),
    "output": Host(einsum("abde,dec->abc", (4, 6), "c"), (4, 3, 5), "abde,dec->abc"),
    "gemma": Host(einsum("btd,ndh->btnh", (4, 3, 5), "nh"), (4, 6), "btd,ndh->btnh"),
    "experts": Host(einsum("abc,bcd->abd", (4, 5), "bd"), (4, 6), "abc,bcd->abd"),
    "embedding": Host(embedding, (4,), "abv,vd->abd", 9, "embeddings"),
}
CALIBRATED_PAIRS = [
    ("dense", "gptq"),
    ("dense", "gptq 8 bits"),
    ("dense", "awq"),
    ("query", "gptq"),
    ("output", "awq"),
]
EVERY = [(name, mode) for name in HOSTS for mode in MODES]
EVERY += CALIBRATED_PAIRS if CALIBRATED else []
over_every = pytest.mark.parametrize(("name", "mode"), EVERY)
over_hosts = pytest.mark.parametrize("name", HOSTS)
# Each host and each mode, where the product of both would say no more.
PAIRS = [("dense", mode) for mode in MODES] + [
    ("query", "int8"),
    ("query", "int4 blocks"),
    ("gemma", "int8"),
    ("output", "int4"),
    ("experts", "int8 weights"),
    ("embedding", "int8"),
    ("embedding", "int4 blocks"),
    *CALIBRATED_PAIRS,
]
PAIRS = [pair for pair in PAIRS if pair[1] in {**MODES, **CALIBRATED}]
over_pairs = pytest.mark.parametrize(("name", "mode"), PAIRS)
# Each way in which a kernel is kept once, where a test trains or writes files.
KEPT = [
    ("dense", "int8"),
    ("query", "int8 weights"),
    ("gemma", "int4 blocks"),
    ("output", "int4"),
    ("embedding", "int4 blocks"),
    ("dense", "gptq 8 bits"),
    ("output", "awq"),
]
KEPT = [pair for pair in KEPT if pair[1] in {**MODES, **CALIBRATED}]
over_kept = pytest.mark.parametrize(("name", "mode"), KEPT)
over_modes = pytest.mark.parametrize("mode", MODES)


def layer_bias(layer):
    return getattr(layer, "bias", None)


def dequantized_kernel(layer):
    """W in float64, from the layer's variables alone."""
    stored = {v.name: to_numpy(v) for v in layer.variables}
    table = "embeddings" in stored
    if layer.quantization_mode in CALIBRATED:
        return calibrated(layer, stored)
    name = "embeddings" if table else "kernel"
    kernel = stored[name]
    scale = stored[f"{name}_scale"].astype("float64")
    if EARLIER and layer.quantization_mode == "int4" and not table:
        kernel = unpacked_earlier(layer, kernel)
    if layer.quantization_mode == "int8" or (EARLIER and not table):
        if hasattr(layer, "equation"):  # Keras keeps it as the outputs lie
            own, outputs = layer.equation.split(",")[1].split("->")
            letters = "".join(axis for axis in outputs if axis in own)
            wanted = f"{own},{letters}->{own}"
            return np.einsum(wanted, kernel.astype("f8"), 1 / scale.squeeze())
        return kernel / (scale[:, None] if table else scale)
    # Two a byte along the last axis, the lower half first; what is no table is a
    # matrix, reshaped.
    halves = np.stack([kernel & 15, (kernel >> 4) & 15], axis=-1).reshape(
        len(kernel), -1
    )
    width = layer.output_dim if table else scale.shape[-1]
    values = ((halves.astype("int64") ^ 8) - 8)[:, :width]
    zero = stored.get(f"{name}_zero", stored.get("zero_point"))  # of Keras 3.16
    if zero is not None:
        groups, zero = stored["g_idx"].astype("int64"), zero.astype("float64")
        scale, zero = (np.take(x, groups, axis=int(table)) for x in (scale, zero))
        values = (values - zero) * scale
    else:
        values = values / (scale[:, None] if table else scale)
    return values.reshape(kernel_shape(layer, values))


def unpacked_earlier(layer, kernel):
    """Two a byte along the first axis that is summed over, in Keras 3.12."""
    axis, length = 0, getattr(layer, "_orig_input_dim", None)
    if hasattr(layer, "equation"):
        inputs, own, outputs = layer.equation.replace("->", ",").split(",")
        axis = next(n for n, x in enumerate(own) if x in inputs and x not in outputs)
        length = layer._orig_length_along_pack_axis
    kernel = np.moveaxis(kernel, axis, 0)
    halves = np.stack([kernel & 15, (kernel >> 4) & 15], axis=1)
    values = halves.reshape(-1, *kernel.shape[1:])[:length]
    return np.moveaxis((values.astype("int64") ^ 8) - 8, 0, axis)


def calibrated(layer, stored):
    """W, of which GPTQ and AWQ keep (outputs, inputs), before Keras 3.16."""
    values, scale = stored["kernel"], stored["kernel_scale"].astype("float64")
    zero = stored.get("kernel_zero", stored.get("zero_point")).astype("float64")
    if LATER:
        values, scale, zero = values.T, scale.T, zero.T
    if len(values) != len(scale):  # two a byte along the outputs
        values = np.stack([values & 15, values >> 4], axis=1)
        values = values.reshape(-1, values.shape[-1])[: len(scale)]
    groups = stored["g_idx"].astype("int64")
    values = ((values - zero[:, groups]) * scale[:, groups]).T
    values = values / stored.get("awq_scales", np.ones(len(values)))[:, None]
    return values.reshape(kernel_shape(layer, values))


def kernel_shape(layer, values):
    """Keras keeps an einsum's kernel as a matrix."""
    if LATER and hasattr(layer, "equation"):
        return layer.kernel_shape
    return getattr(layer, "original_kernel_shape", values.shape)


def delta(layer):
    """scaling * A @ B in W's shape."""
    a, b = (to_numpy(v).astype("float64") for v in (layer.lora.a, layer.lora.b))
    if not hasattr(layer, "equation"):
        return layer.lora.scaling * a @ b
    inputs, own, outputs = layer.equation.replace("->", ",").split(",")
    batch = "".join(x for x in own if x in inputs and x in outputs)
    contracted = "".join(x for x in own if x in inputs and x not in outputs)
    new = "".join(x for x in own if x not in inputs)
    compose = f"{batch}{contracted}r,{batch}r{new}->{own}"
    return layer.lora.scaling * np.einsum(compose, a, b)


def integers(layer):
    """What must never move, by path."""
    adapter = {id(v) for v in layer.lora.variables} if layer.lora else set()
    return {v.path: to_numpy(v) for v in layer.variables if id(v) not in adapter}


def assert_unmoved(layer, before):
    after = integers(layer)
    assert after.keys() == before.keys()
    for path, value in before.items():
        np.testing.assert_array_equal(after[path], value, err_msg=path)


def close(found, wanted, tolerance=2e-5):
    scale = np.abs(wanted).max() or 1.0
    np.testing.assert_allclose(
        to_numpy(found).astype("float64") / scale, wanted / scale, atol=tolerance
    )


@pytest.mark.parametrize(
    ("name", "mode", "policy"),
    [(*pair, "float32") for pair in EVERY] + [(*p, "mixed_bfloat16") for p in KEPT],
)
def test_a_fresh_adapter_changes_no_bit(name, mode, policy):
    host, inputs = HOSTS[name], HOSTS[name].inputs()
    layer = host.quantized(mode, dtype=policy)
    wanted = to_numpy(layer(inputs))
    stored = {v.path: to_numpy(v) for v in layer.variables}
    host.apply(layer)
    for training in (False, True):
        found = layer(inputs, training=training)
        assert keras.backend.standardize_dtype(found.dtype) == layer.compute_dtype
        np.testing.assert_array_equal(to_numpy(found), wanted)
    assert_unmoved(layer, stored)


@over_every
def test_outputs_are_keras_operation_and_bypass_then_bias_and_activation(name, mode):
    host, inputs = HOSTS[name], HOSTS[name].inputs()
    layer = host.adapted(mode, activation="relu")
    bare = host.quantized(mode, use_bias=False)
    for variable in bare.variables:
        source = next(v for v in layer.variables if v.name == variable.name)
        variable.assign(source)
    bypass = np.einsum(host.equation, host.as_floats(inputs), delta(layer))
    wanted = to_numpy(bare(inputs)) + bypass
    if layer_bias(layer) is not None:
        wanted = np.maximum(wanted + to_numpy(layer.bias), 0)
    for training in (False, True):
        close(layer(inputs, training=training), wanted)


@pytest.mark.parametrize(
    ("name", "mode", "compiled"),
    [(name, mode, False) for name, mode in EVERY]
    + [(name, mode, True) for name, mode in KEPT],
)
def test_gradients_are_those_of_the_dequantized_float_layer(name, mode, compiled):
    host, inputs = HOSTS[name], HOSTS[name].inputs()
    layer = host.adapted(mode)
    before = integers(layer)
    outputs = to_numpy(layer(inputs))
    weights = np.random.default_rng(2).standard_normal(outputs.shape, "float32")
    x, w, out = host.equation.replace("->", ",").split(",")
    kernel = dequantized_kernel(layer)
    of_kernel = np.einsum(f"{x},{out}->{w}", host.as_floats(inputs), weights)
    # A and B train as if each were the only factor of W + delta.
    wanted = [
        directional(layer, of_kernel, factor) for factor in (layer.lora.a, layer.lora.b)
    ]
    if not host.vocabulary:
        of_inputs = np.einsum(f"{out},{w}->{x}", weights, kernel + delta(layer))
        wanted.append(of_inputs)
    found = gradients(layer, inputs, weights, compiled=compiled)
    for value, expected in zip(found, wanted, strict=True):
        close(value, expected)
    assert_unmoved(layer, before)


def directional(layer, of_kernel, factor):
    """The gradient of A or B for one of the kernel: delta is linear in each."""
    value, found = to_numpy(factor), []
    for index in np.ndindex(value.shape):
        unit = np.zeros_like(value)
        unit[index] = 1
        factor.assign(unit)
        found.append((delta(layer) * of_kernel).sum())
    factor.assign(value)
    return np.reshape(found, value.shape)


def model_of(host, mode, adapted=True, eager=True, seed=3):
    """A model with an adapted layer between plain ones, and data to train it."""
    set_seed(seed)
    dtype = "int32" if host.vocabulary else "float32"
    first = keras.Input(host.input_shape, dtype=dtype)
    x = host.make(name="host")(first)
    x = keras.layers.Flatten()(x)
    model = keras.Model(first, keras.layers.Dense(2, name="head")(x))
    for layer in model.layers:
        if layer.variables and (mode in MODES or layer.name == "host"):
            quantize(layer, mode, host)
    how = {"run_eagerly": True} if eager else {"jit_compile": False}
    model.compile(keras.optimizers.Adam(0.05), "mse", **how)
    if adapted:
        keras_lora.apply_lora(model, rank=3, target=["host"])
    inputs = host.inputs(16)
    targets = np.random.default_rng(4).standard_normal((16, 2)).astype("float32")
    return model, inputs, targets


def losses(model, inputs, targets, epochs=2, **more):
    return shared.losses(model, inputs, targets, epochs, **more)


def predict(model, inputs):
    return to_numpy(model(inputs, training=False))


@over_kept
def test_training_moves_the_adapter_alone_and_goes_on_after_reloading(
    name, mode, tmp_path
):
    eager = (name, mode) not in KEPT[:2]
    model, inputs, targets = model_of(HOSTS[name], mode, eager=eager)
    host = model.get_layer("host")
    before = integers(host)
    first = losses(model, inputs, targets, epochs=5)
    assert first[-1] < first[0]
    assert_unmoved(host, before)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.get_layer("host").quantization_mode == kind_of(mode)
    assert_unmoved(again.get_layer("host"), before)
    np.testing.assert_array_equal(predict(again, inputs), predict(model, inputs))
    wanted = losses(model, inputs, targets)
    np.testing.assert_allclose(losses(again, inputs, targets), wanted, rtol=1e-6)
    assert_unmoved(again.get_layer("host"), before)


def state(model):
    """All that a run goes on from: integers, scales, A, B, alpha, the optimizer."""
    variables = [*model.variables, *model.optimizer.variables]
    alphas = [layer.lora.alpha for layer in adapted_sites(model)]
    return [(v.name, to_numpy(v)) for v in variables] + [("alpha", alphas)]


def assert_resumed(model, before):
    after = state(model)
    assert [name for name, _ in after] == [name for name, _ in before]
    for (name, value), (_, wanted) in zip(after, before, strict=True):
        np.testing.assert_array_equal(value, wanted, err_msg=name)


over_resumed = pytest.mark.parametrize(
    ("name", "mode"),
    [("dense", "int8"), ("dense", "int4"), ("query", "int4"), ("embedding", "int8")],
)


@over_resumed
def test_weights_and_checkpoints_of_keras_bring_all_back(name, mode, tmp_path):
    model, inputs, targets = model_of(HOSTS[name], mode)
    model.get_layer("host").lora.alpha = 7
    write = keras.callbacks.ModelCheckpoint
    weights = write(tmp_path / "kept.weights.h5", save_weights_only=True)
    whole = write(tmp_path / "kept.keras")
    losses(model, inputs, targets, callbacks=[weights, whole])
    before = state(model)
    wanted = losses(model, inputs, targets)
    # Of other integers, A, B and alpha until they are loaded.
    other, *_ = model_of(HOSTS[name], mode, seed=4)
    other.optimizer.build(other.trainable_variables)
    other.load_weights(tmp_path / "kept.weights.h5")
    for resumed in (other, keras.saving.load_model(tmp_path / "kept.keras")):
        resumed.compile(resumed.optimizer, "mse", run_eagerly=True)
        assert_resumed(resumed, before)
        assert losses(resumed, inputs, targets) == wanted


# The files are those of the weights: of each of these there is a test above.
@pytest.mark.parametrize(("name", "mode"), [("dense", "int8"), ("query", "int4")])
def test_backup_and_restore_goes_on_where_it_was(name, mode, tmp_path):
    def run(seed, **more):
        model, inputs, targets = model_of(HOSTS[name], mode, seed=seed)
        if seed == 3:
            model.get_layer("host").lora.alpha = 7
        backup = keras.callbacks.BackupAndRestore(tmp_path)
        callbacks = [backup, *more.pop("callbacks", ())]
        return model, losses(model, inputs, targets, callbacks=callbacks, **more)

    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    whole, wanted = run(3, epochs=4)
    with pytest.raises(KeyboardInterrupt):
        run(3, epochs=4, callbacks=[Stop()])
    resumed, found = run(4, epochs=4)
    assert found == wanted[2:]
    assert_resumed(resumed, state(whole))


@over_kept
def test_what_trains_is_counted_and_removed_to_the_bit(name, mode):
    plain, inputs, targets = model_of(HOSTS[name], mode, adapted=False)
    model, *_ = model_of(HOSTS[name], mode)
    host = model.get_layer("host")
    count = sum(int(np.prod(v.shape)) for v in (host.lora.a, host.lora.b))
    assert keras_lora.summary(model).trained == count
    assert [v.name for v in model.trainable_variables] == ["a", "b"]
    losses(model, inputs, targets)
    keras_lora.remove_lora(model)
    for layer, other in zip(model.layers, plain.layers, strict=True):
        assert type(layer) is type(other)
        assert [v.name for v in layer.variables] == [v.name for v in other.variables]
        assert [v.trainable for v in layer.variables] == [
            v.trainable for v in other.variables
        ]
    np.testing.assert_array_equal(predict(model, inputs), predict(plain, inputs))


@over_pairs
def test_merging_says_what_it_loses(name, mode):
    model, inputs, _ = model_of(HOSTS[name], mode)
    host = model.get_layer("host")
    fill(host.lora.a, 8, scale=0.3)
    fill(host.lora.b, 9, scale=0.3)
    before = integers(host)
    with pytest.raises(ValueError, match=r'"dequantize".*"requantize"'):
        keras_lora.merge_lora(model)
    with pytest.raises(ValueError, match="Received: 'round'"):
        keras_lora.merge_lora(model, quantized="round")
    with pytest.raises(ValueError, match="'host' is quantized"):
        keras_lora.merged(model)
    assert_unmoved(host, before)
    wanted = dequantized_kernel(host) + delta(host)

    copy, *_ = model_of(HOSTS[name], mode)
    copy.set_weights(model.get_weights())
    (row,) = keras_lora.merge_lora(copy, quantized="dequantize")
    layer = copy.get_layer("host")
    assert (row.path, row.layer) == ("host", layer)
    assert row.error < 1e-6
    assert layer.quantization_mode is None and type(layer) is type(HOSTS[name].make())
    close(getattr(layer, HOSTS[name].kernel_name), wanted)
    names = [v.name for v in layer.variables]
    float_layer = HOSTS[name].make()
    float_layer.build((None, *HOSTS[name].input_shape))
    assert names == [v.name for v in float_layer.variables]
    assert all(v.trainable for v in layer.variables)
    copy.compile("sgd", "mse", run_eagerly=True)
    losses(copy, inputs, np.zeros((16, 2), "float32"), epochs=1)

    if mode in CALIBRATED:
        with pytest.raises(ValueError, match=r"calibrated 'host'.*not kept"):
            keras_lora.merge_lora(model, quantized="requantize")
        assert_unmoved(host, before)
        return
    (row,) = keras_lora.merge_lora(model, quantized="requantize")
    assert host.quantization_mode == kind_of(mode)
    assert {v.path for v in host.variables} == before.keys()
    found = np.linalg.norm(dequantized_kernel(host) - wanted) / np.linalg.norm(wanted)
    assert 1e-4 < found < 0.5
    np.testing.assert_allclose(row.error, found, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "mode"), slow_but(("dense-int8", "output-int4", "output-awq"), KEPT)
)
def test_the_exported_artifact_needs_no_package_and_gives_the_live_outputs(
    name, mode, tmp_path
):
    tf = pytest.importorskip("tensorflow")
    if keras.backend.backend() == "torch":
        pytest.skip("Keras exports no SavedModel from torch.")
    model, inputs, targets = model_of(HOSTS[name], mode)
    losses(model, inputs, targets)
    before = integers(model.get_layer("host"))
    keras_lora.export(model, tmp_path / "served")
    served = tf.saved_model.load(str(tmp_path / "served"))
    found = served.serve(tf.constant(inputs)).numpy()
    np.testing.assert_allclose(found, predict(model, inputs), rtol=1e-5, atol=1e-6)
    assert_unmoved(model.get_layer("host"), before)
    assert len(adapted_sites(model)) == 1


@over_modes
@pytest.mark.parametrize("way", ["dequantize", "requantize"])
def test_the_error_of_merging_in_half_precision_is_that_of_rounding(mode, way):
    layer = HOSTS["dense"].adapted(mode, dtype="bfloat16")
    wanted = dequantized_kernel(layer) + delta(layer)
    (row,) = keras_lora.merge_lora(layer, quantized=way)
    kernel = (
        dequantized_kernel(layer) if way == "requantize" else to_numpy(layer.kernel)
    )
    found = np.linalg.norm(kernel - wanted) / np.linalg.norm(wanted)
    assert found > 1e-4
    # What Keras dequantizes is rounded itself, in half precision.
    np.testing.assert_allclose(row.error, found, rtol=0.4)


def run_onnx(path, inputs):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("tf2onnx")

    session = onnxruntime.InferenceSession(path)
    return session.run(None, {session.get_inputs()[0].name: inputs})[0]


def run_litert(path, inputs):
    import tensorflow as tf

    interpreter = tf.lite.Interpreter(str(path))
    run = interpreter.get_signature_runner()
    (name,) = run.get_input_details()
    return next(iter(run(**{name: inputs}).values()))


RUNTIMES = {"onnx": run_onnx, "litert": run_litert}
ENDINGS = {"onnx": "model.onnx", "litert": "model.tflite"}
only_tensorflow = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="others need packages of their own"
)
over_formats = pytest.mark.parametrize("format", RUNTIMES)
# The old names that tf2onnx looks for in NumPy, and TensorFlow's own interpreter.
old_packages = pytest.mark.filterwarnings(
    "ignore::FutureWarning",
    "ignore::DeprecationWarning",
    "ignore:[\\s\\S]*tf.lite.Interpreter is deprecated",
)


@only_tensorflow
@pytest.mark.slow  # and what CI alone installs
@old_packages
@over_formats
@over_kept
def test_formats_that_the_plain_model_has_the_adapted_one_has_too(
    name, mode, format, tmp_path
):
    host, run = HOSTS[name], RUNTIMES[format]
    path = tmp_path / ENDINGS[format]
    plain, inputs, _ = model_of(host, mode, adapted=False)
    plain(inputs)
    try:
        plain.export(path, format=format, verbose=False)
        run(path, inputs)
    except Exception:  # whatever a converter or a runtime raises
        path = None
    model, *_ = model_of(host, mode)
    fill(model.get_layer("host").lora.b, 9, scale=0.3)
    wanted = predict(model, inputs)
    if path is None:
        with pytest.raises(Exception, match=r"."):
            keras_lora.export(model, tmp_path / ENDINGS[format], format=format)
        return
    keras_lora.export(model, path, format=format)
    close(run(path, inputs), wanted)


@only_tensorflow
@pytest.mark.slow
@old_packages
@over_formats
def test_an_artifact_that_cannot_be_run_is_not_kept(format, tmp_path, monkeypatch):
    """Here of operations that keep the integers from being unpacked before."""
    monkeypatch.setattr(
        "keras_lora.layers.quantized_host.tracing_artifact", contextlib.nullcontext
    )
    model, inputs, _ = model_of(HOSTS["dense"], [*MODES][-1])
    model(inputs)
    path = tmp_path / ENDINGS[format]
    path.write_text("old")
    with pytest.raises(ValueError, match=f"'{format}' cannot be run"):
        keras_lora.export(model, path, format=format)
    assert path.read_text() == "old"
    assert [x.name for x in tmp_path.iterdir()] == [path.name]


def run_openvino(path, inputs):
    import openvino

    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    return openvino.Core().compile_model(path, "CPU", exact)([inputs])[0]


@only_tensorflow
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["int4", "int8"])
def test_openvino_gets_what_it_computes_rightly(mode, tmp_path):
    """It takes products of integers for zeros, those of the plain model too."""
    model, inputs, _ = model_of(HOSTS["dense"], mode)
    fill(model.get_layer("host").lora.b, 9, scale=0.3)
    path = tmp_path / "model.xml"
    if mode == "int8":
        with pytest.raises(ValueError, match=r"'openvino' cannot be run.*integers"):
            keras_lora.export(model, path, format="openvino")
        assert not list(tmp_path.iterdir())
        return
    keras_lora.export(model, path, format="openvino")
    close(run_openvino(path, inputs), predict(model, inputs))


@over_kept
def test_an_adapter_goes_to_the_float_model_and_back(name, mode, tmp_path):
    host = HOSTS[name]
    model, inputs, targets = model_of(host, mode)
    losses(model, inputs, targets)
    keras_lora.save_adapter(model, tmp_path / "adapter")
    floats = keras.Sequential(
        [
            keras.Input(host.input_shape, dtype="int32" if host.vocabulary else None),
            host.make(name="host"),
        ]
    )
    keras_lora.load_adapter(floats, tmp_path / "adapter")
    own, other = model.get_layer("host").lora, floats.get_layer("host").lora
    np.testing.assert_array_equal(to_numpy(other.a), to_numpy(own.a))
    np.testing.assert_array_equal(to_numpy(other.b), to_numpy(own.b))
    assert other.scaling == own.scaling
    fresh, *_ = model_of(host, mode, adapted=False)
    keras_lora.load_adapter(fresh, tmp_path / "adapter")
    np.testing.assert_array_equal(predict(fresh, inputs), predict(model, inputs))


@over_pairs
def test_disabled_is_the_quantized_model(name, mode):
    host, inputs = HOSTS[name], HOSTS[name].inputs()
    layer = host.adapted(mode, trained=False)
    wanted = to_numpy(layer(inputs))
    fill(layer.lora.a, 8)
    fill(layer.lora.b, 9)
    assert np.abs(to_numpy(layer(inputs)) - wanted).max() > 0.1
    with keras_lora.disabled(layer):
        np.testing.assert_array_equal(to_numpy(layer(inputs)), wanted)


@pytest.mark.parametrize("name", ["query", "embedding"])
def test_threads_see_what_one_sees_and_a_call_changes_nothing(name):
    layer = HOSTS[name].adapted("int8")
    batches = [HOSTS[name].inputs(seed=seed) for seed in range(8)]
    wanted = [to_numpy(layer(x)) for x in batches]
    attributes = {key: id(value) for key, value in vars(layer).items()}
    found = [[] for _ in batches]

    def call(index):
        for _ in range(20):
            found[index].append(to_numpy(layer(batches[index])))

    threads = [threading.Thread(target=call, args=(n,)) for n in range(len(batches))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for outputs, expected in zip(found, wanted, strict=True):
        assert len(outputs) == 20
        for output in outputs:
            np.testing.assert_array_equal(output, expected)
    assert {key: id(value) for key, value in vars(layer).items()} == attributes


@over_hosts
def test_constructors_take_quantized_policies(name):
    host = HOSTS[name]
    lora_class = type(host.adapted("int8"))
    config = host.make().get_config() | {"dtype": "int8_from_float32", "name": "own"}
    layer = lora_class.from_config(config | {"rank": 2})
    layer.build((None, *host.input_shape))
    source = host.quantized("int8")
    for variable in source.variables:
        own = next(v for v in layer.variables if v.name == variable.name)
        own.assign(variable)
    np.testing.assert_array_equal(
        to_numpy(layer(host.inputs())), to_numpy(source(host.inputs()))
    )
    assert [v.name for v in layer.trainable_variables if v.name != "bias"] == ["a", "b"]


def test_a_mode_that_is_refused_is_refused_before_any_layer_changes():
    layers = [keras.layers.Dense(6, name="plain"), keras.layers.Dense(6, name="own")]
    model = keras.Sequential([keras.Input((6,)), *layers])
    keras_lora.apply_lora(model, rank=2, target=["own"])
    with pytest.raises(ValueError, match="'own' cannot have an adapter"):
        model.quantize("float8")
    assert layers[0].quantization_mode is None


def test_float8_is_refused_by_name():
    layer = keras.layers.Dense(4, name="projection")
    model = keras.Sequential([keras.Input((3,)), layer])
    layer.quantize("float8")
    with pytest.raises(ValueError, match=r"'projection'.*'float8'.*scales are trained"):
        keras_lora.apply_lora(model, target=keras.layers.Dense)
    assert type(layer) is keras.layers.Dense
    with pytest.raises(ValueError, match="'float8'"):
        keras_lora.LoRADense(4, dtype="float8_from_float32")


def test_a_quantized_head_that_is_to_train_is_refused(tmp_path):
    def build(**head):
        dense = keras.layers.Dense
        return keras.Sequential(
            [keras.Input((6,)), dense(4, name="up"), dense(3, name="head", **head)]
        )

    model = build()
    model.quantize("int8")
    before = [(v.trainable, to_numpy(v)) for v in model.variables]
    with pytest.raises(ValueError, match=r"`also_train` names 'head'.*filters"):
        keras_lora.apply_lora(model, target=["up"], also_train=["head"])
    assert type(model.layers[0]) is keras.layers.Dense
    for variable, (flag, value) in zip(model.variables, before, strict=True):
        assert variable.trainable == flag
        np.testing.assert_array_equal(to_numpy(variable), value)
    trained = build()
    keras_lora.apply_lora(trained, rank=2, target=["up"], also_train=["head"])
    keras_lora.save_adapter(trained, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"quantized.*float values.*filters"):
        keras_lora.load_adapter(model, tmp_path / "adapter")
    model = build(dtype="int8_from_float32")
    with pytest.raises(ValueError, match="names 'head'"):
        keras_lora.apply_lora(model, target=["up"], also_train=["head"])
    # A layer under such a policy that has no integers trains as ever.
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(4, name="up"),
            keras.layers.LayerNormalization(name="norm", dtype="int8_from_float32"),
        ]
    )
    keras_lora.apply_lora(model, target=["up"], also_train=["norm"])
    assert model.layers[1].gamma.trainable


@over_samples
def test_what_is_not_calibrated_is_refused_with_the_reason():
    layer = keras.layers.Dense(4, name="projection")
    model = keras.Sequential([keras.Input((3,)), layer])
    layer.quantize("gptq", config=CALIBRATED["gptq"]())
    with pytest.raises(ValueError, match=r"'projection'.*'gptq'.*not calibrated"):
        keras_lora.apply_lora(model, target=["projection"])
    assert type(layer) is keras.layers.Dense


@over_samples
@pytest.mark.parametrize("mode", ["gptq/4/2", "awq/4/2"])
def test_what_has_no_integers_yet_is_refused_too(mode):
    """A layer that was made by its policy: Keras has no kernel for its call.

    Since Keras 3.16 it has integers, all zero, and computes with them.
    """
    layer = keras.layers.Dense(4, name="projection", dtype=f"{mode}_from_float32")
    model = keras.Sequential([keras.Input((4,)), layer])
    if hasattr(layer, "calibration_pending"):
        keras_lora.apply_lora(model, rank=2, target=["projection"])
        fill(layer.lora.b, 1)
        found = to_numpy(model(np.ones((1, 4))))
        expected = to_numpy(layer.lora.delta()).sum(axis=0)
        np.testing.assert_allclose(found[0], expected, rtol=1e-5)
        return
    with pytest.raises(ValueError, match=r"'projection'.*not calibrated"):
        keras_lora.apply_lora(model, target=["projection"])
    assert type(layer) is keras.layers.Dense


@over_samples
def test_calibrating_an_adapted_model_and_quantizing_anew_are_refused():
    host = HOSTS["dense"]
    model, *_ = model_of(host, "awq")
    with pytest.raises(ValueError, match=r"'loftq'.*calibrated 'host'.*not kept"):
        keras_lora.initialize_lora(model, "loftq", data=model)
    keras_lora.merge_lora(model, quantized="dequantize")
    keras_lora.apply_lora(model, rank=2, target=["host"])
    for mode in ("gptq", "awq"):
        with pytest.raises(ValueError, match=f"'host' has an adapter.*'{mode}'"):
            model.quantize(mode, config=CALIBRATED[mode]())
    assert all(layer.quantization_mode is None for layer in model.layers)


@over_samples
def test_calibrated_layers_without_an_adapter_are_saved_whole(tmp_path):
    """Keras 3.15 leaves out their zeros, and reads no such file."""
    host = HOSTS["dense"]
    model, inputs, targets = model_of(host, "gptq", adapted=False)
    keras_lora.apply_lora(model, rank=2, target=["head"])
    losses(model, inputs, targets, epochs=1)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(predict(again, inputs), predict(model, inputs))
    again.save(tmp_path / "again.keras")
    again = keras.saving.load_model(tmp_path / "again.keras")
    np.testing.assert_array_equal(predict(again, inputs), predict(model, inputs))
    keras_lora.remove_lora(model)
    assert type(model.get_layer("host")) is keras.layers.Dense


@over_samples
def test_constructors_take_calibrated_policies():
    source = HOSTS["dense"].adapted("awq")
    layer = type(source).from_config(source.get_config())
    layer.build((None, *HOSTS["dense"].input_shape))
    for own, other in zip(layer.variables, source.variables, strict=True):
        own.assign(other)
    layer.is_awq_calibrated = True  # as Keras says it of a layer that it loads
    inputs = HOSTS["dense"].inputs()
    np.testing.assert_array_equal(to_numpy(layer(inputs)), to_numpy(source(inputs)))


def test_int4_kernels_that_keras_quantizes_along_a_wrong_axis_are_named():
    """Gemma's query: the error is that of blocks of unlike numbers."""
    kernel = np.random.default_rng(0).standard_normal((6, 8, 16))
    kernel *= 4.0 ** np.arange(6)[:, None, None]  # heads of unlike size
    mean = {}
    for equation, value in {
        "btd,dnh->btnh": kernel.transpose(1, 0, 2),
        "btd,ndh->btnh": kernel,
    }.items():
        layer = keras.layers.EinsumDense(equation, (None, 6, 16), name="query")
        model = keras.Sequential([keras.Input((3, 8)), layer])
        layer.kernel.assign(value)
        quantize(layer, "int4")
        mean[equation] = np.mean(np.abs(dequantized_kernel(layer) / value - 1))
        if "ndh" in equation and not EARLIER:
            message = "int4 kernel of 'query'.*btd,ndh->btnh"
            with pytest.warns(UserWarning, match=message):
                keras_lora.apply_lora(model, target=["query"])
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                keras_lora.apply_lora(model, target=["query"])
    # Keras 3.12 takes the right axis, and nothing is said of it.
    assert (mean["btd,ndh->btnh"] > 2 * mean["btd,dnh->btnh"]) != EARLIER


@over_samples
def test_calibrated_kernels_whose_inputs_keras_takes_for_others_are_named():
    """It takes the largest axis of a kernel for the model's width."""
    host = Host(einsum("abc,cde->abde", (4, 3, 9), "de"), (4, 6), "abc,cde->abde")
    with pytest.warns(UserWarning, match="gptq kernel of 'host'.*abc,cde->abde"):
        host.adapted("gptq")
    HOSTS["query"].adapted("gptq")  # without a warning


def head(mode="int8", **arguments):
    """A tied embedding, and its table in float64."""
    layer = keras.layers.ReversibleEmbedding(9, 5, name="host", **arguments)
    ids = keras.Input((4,), dtype="int32")
    model = keras.Model(ids, layer(layer(ids), reverse=True))
    fill(layer.embeddings, 3)
    if not layer.tie_weights:
        fill(layer.reverse_embeddings, 4)
    quantize(layer, mode)
    return layer, model


class Backwards(keras.layers.Layer):
    """The reverse direction of a layer, for `gradients`."""

    def __init__(self, layer):
        super().__init__()
        self.inner, self.built = layer, True

    def call(self, inputs, training=None):
        if training is None or not hasattr(self.inner, "lora"):
            return self.inner(inputs, reverse=True)
        return self.inner(inputs, reverse=True, training=training)


@over_modes
def test_a_tied_head_starts_equal_in_both_directions(mode):
    layer, model = head(mode, logit_soft_cap=3.0)
    ids = np.random.default_rng(0).integers(0, 9, (2, 4)).astype("int32")
    hidden = np.random.default_rng(1).standard_normal((2, 4, 5)).astype("float32")
    wanted = to_numpy(layer(ids)), to_numpy(layer(hidden, reverse=True))
    keras_lora.apply_lora(model, rank=2, target=["host"])
    for training in (False, True):
        found = layer(ids, training=training)
        np.testing.assert_array_equal(to_numpy(found), wanted[0])
        found = layer(hidden, reverse=True, training=training)
        np.testing.assert_array_equal(to_numpy(found), wanted[1])


@over_modes
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("adapted", [True, False])
def test_a_quantized_head_has_the_gradient_of_its_dequantized_table(
    mode, tied, adapted
):
    """Without an adapter too; Keras goes through `round` in int8."""
    layer, model = head(mode, tie_weights=tied)
    other = keras.layers.Dense(2, name="other")  # something to adapt
    model = keras.Model(model.input, other(model.output))
    keras_lora.apply_lora(model, rank=2, target=["host"] if adapted else ["other"])
    kernel = dequantized_kernel(layer).T
    if not tied:
        kernel = untied(layer)
    if adapted:
        fill(layer.lora.a, 8)
        fill(layer.lora.b, 9)
        kernel = kernel + delta(layer).T * tied
    hidden = np.random.default_rng(1).standard_normal((2, 4, 5)).astype("float32")
    weights = np.random.default_rng(2).standard_normal((2, 4, 9)).astype("float32")
    found = of_inputs(Backwards(layer), hidden, weights)
    close(found, weights @ kernel.T)
    keras_lora.remove_lora(model)
    assert type(layer) is keras.layers.ReversibleEmbedding


def untied(layer):
    """The kernel of an untied head in float64; int4 is packed along its first axis."""
    stored = {v.name: to_numpy(v) for v in layer.variables}
    kernel = stored["reverse_embeddings"]
    scale = stored["reverse_embeddings_scale"].astype("float64")
    if layer.quantization_mode == "int8":
        return kernel / scale
    halves = np.stack([kernel & 15, (kernel >> 4) & 15], axis=1)
    values = (halves.reshape(-1, kernel.shape[1]).astype("int64") ^ 8) - 8
    values = values[: layer.output_dim]
    if "reverse_embeddings_zero" not in stored:
        return values / scale
    groups = stored["g_idx"].astype("int64")
    return (values - stored["reverse_embeddings_zero"][groups]) * scale[groups]


def of_inputs(layer, inputs, weights):
    """d sum(weights * layer(inputs)) / d inputs."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        x = tf.constant(inputs)
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(layer(x) * weights)
        return tape.gradient(loss, x).numpy()
    if backend == "torch":
        import torch

        x = torch.tensor(inputs, requires_grad=True)
        (layer(x) * torch.tensor(weights)).sum().backward()
        return to_numpy(x.grad)
    import jax

    return np.asarray(jax.grad(lambda x: (layer(x) * weights).sum())(inputs))


def test_keras_own_int8_head_has_another_gradient():
    """So that the mending above is seen to be needed; it may go when Keras is right."""
    layer, _ = head("int8")
    hidden = np.random.default_rng(1).standard_normal((2, 4, 5)).astype("float32")
    weights = np.random.default_rng(2).standard_normal((2, 4, 9)).astype("float32")
    found = of_inputs(Backwards(layer), hidden, weights)
    assert cosine(found, weights @ dequantized_kernel(layer)) < 0.9


def cosine(one, other):
    one, other = np.ravel(one), np.ravel(other)
    return one @ other / np.linalg.norm(one) / np.linalg.norm(other)


def test_a_head_goes_through_files_and_merges(tmp_path):
    for tied in (True, False):
        layer, model = head("int8", tie_weights=tied)
        keras_lora.apply_lora(model, rank=2, target=["host"])
        fill(layer.lora.a, 8, scale=0.3)
        fill(layer.lora.b, 9, scale=0.3)
        ids = np.random.default_rng(0).integers(0, 9, (2, 4)).astype("int32")
        model.save(tmp_path / "model.keras")
        again = keras.saving.load_model(tmp_path / "model.keras")
        np.testing.assert_array_equal(predict(again, ids), predict(model, ids))
        table = dequantized_kernel(layer) + delta(layer)
        back = table.T if tied else untied(layer)
        keras_lora.merge_lora(model, quantized="dequantize")
        assert type(layer) is keras.layers.ReversibleEmbedding
        assert layer.quantization_mode is None
        close(predict(model, ids), table[ids] @ back)
        (row,) = keras_lora.merge_lora(again, quantized="requantize")
        host = again.get_layer("host")
        found = np.linalg.norm(dequantized_kernel(host) - table) / np.linalg.norm(table)
        np.testing.assert_allclose(row.error, found, rtol=1e-3)


def float_model():
    """Two Dense layers and an embedding in a functional model, adapted and trained."""
    ids = keras.Input((4,), dtype="int32")
    x = keras.layers.Embedding(9, 6, name="table")(ids)
    x = keras.layers.Dense(8, activation="relu", name="hidden")(x)
    x = keras.layers.Flatten()(x)
    model = keras.Model(ids, keras.layers.Dense(2, name="out")(x))
    model.compile(keras.optimizers.Adam(0.02), "mse", run_eagerly=True)
    keras_lora.apply_lora(model, rank=2, alpha=5, target=["table", "hidden"])
    inputs = np.random.default_rng(0).integers(0, 9, (16, 4)).astype("int32")
    targets = np.random.default_rng(1).standard_normal((16, 2)).astype("float32")
    return model, inputs, targets


@over_modes
def test_quantizing_an_adapted_model_keeps_its_adapters(mode, tmp_path):
    model, inputs, targets = float_model()
    losses(model, inputs, targets)
    table, hidden = model.get_layer("table"), model.get_layer("hidden")
    adapters = [to_numpy(v) for v in model.trainable_variables]
    kernel, before = to_numpy(hidden.kernel), predict(model, inputs)
    model.quantize(kind_of(mode), config=MODES[mode]())
    for layer in (table, hidden, model.get_layer("out")):
        assert layer.quantization_mode == kind_of(mode)
    plain = keras.layers.Dense(8)
    plain.build((None, 6))
    plain.kernel.assign(kernel)
    quantize(plain, mode)
    np.testing.assert_array_equal(dequantized_kernel(hidden), dequantized_kernel(plain))
    for variable, value in zip(model.trainable_variables, adapters, strict=True):
        np.testing.assert_array_equal(to_numpy(variable), value)
    assert hidden.lora.alpha == 5
    after = predict(model, inputs)
    assert 0 < np.linalg.norm(after - before) < np.linalg.norm(before)
    unmoved = integers(hidden)
    first = losses(model, inputs, targets)
    assert first[-1] < first[0]
    assert_unmoved(hidden, unmoved)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(predict(again, inputs), predict(model, inputs))
    keras_lora.remove_lora(model)
    assert type(hidden) is keras.layers.Dense
    assert [v.name for v in hidden.variables] == [v.name for v in plain.variables]


@pytest.mark.parametrize(
    "mode, first",
    [*[(mode, "quantize") for mode in list(MODES)[-2:]], ("int8", "adapt")],
)
def test_attention_comes_back_quantized(mode, first, tmp_path):
    """MultiHeadAttention's configuration does not say it of its projections."""
    x = keras.Input((5, 4))
    attention = keras.layers.MultiHeadAttention(2, 2, name="attention")
    model = keras.Model(x, keras.layers.Dense(2)(attention(x, x)))

    def quantize():
        model.quantize(kind_of(mode), config=MODES[mode]())

    steps = [quantize, lambda: keras_lora.apply_lora(model, rank=2)]
    for step in steps if first == "quantize" else reversed(steps):
        step()
    model.compile(keras.optimizers.Adam(0.01), "mse", run_eagerly=True)
    random = np.random.default_rng(0)
    inputs, targets = (
        random.standard_normal((8, 5, size)).astype("float32") for size in (4, 2)
    )
    losses(model, inputs, targets)
    for _ in range(2):  # what was loaded is saved again
        model.save(tmp_path / "model.keras")
        again = keras.saving.load_model(tmp_path / "model.keras")
        modes = [layer.quantization_mode for layer in again._flatten_layers()]
        assert modes.count(kind_of(mode)) == 5
        again.compile(again.optimizer, "mse", run_eagerly=True)
        assert losses(again, inputs, targets) == losses(model, inputs, targets)
        model = again


@over_samples
@pytest.mark.parametrize("mode", ["gptq", "awq"])
def test_calibrated_attention_comes_back(mode, tmp_path):
    inputs = np.random.default_rng(0).standard_normal((8, 4, 6)).astype("float32")
    x = keras.Input((4, 6))
    attention = keras.layers.MultiHeadAttention(2, 4, name="attention")
    model = keras.Model(x, keras.layers.Dense(2, name="head")(attention(x, x)))
    model.get_quantization_layer_structure = lambda mode: {
        "pre_block_layers": [lambda tokens: keras.ops.convert_to_tensor(inputs)],
        "sequential_blocks": [attention_block(attention)],
    }
    config = CALIBRATED[mode]()
    model.quantize(mode, config=config, filters=lambda layer: layer.name != "head")
    del model.get_quantization_layer_structure
    keras_lora.apply_lora(model, rank=2)
    for seed, layer in enumerate(attention._flatten_layers(recursive=False)):
        if getattr(layer, "lora", None) is not None:
            fill(layer.lora.b, seed)
    expected = predict(model, inputs)
    for _ in range(2):  # what was loaded is saved again
        model.save(tmp_path / "model.keras")
        model = keras.saving.load_model(tmp_path / "model.keras")
        np.testing.assert_array_equal(predict(model, inputs), expected)
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    np.testing.assert_array_equal(predict(copy, inputs), expected)


@over_samples
def test_no_file_leaves_out_a_float_kernel_that_was_not_calibrated(tmp_path):
    host, layer = HOSTS["dense"], keras.layers.Dense(2, name="out")
    hosted = host.quantized("gptq")
    layer.build((None, 5))
    layer.quantize("gptq", config=CALIBRATED["gptq"]())
    model = keras.Sequential([keras.Input(host.input_shape), hosted, layer])
    keras_lora.apply_lora(model, rank=2, target=["host"])
    with pytest.raises(ValueError, match="'out' is quantized with 'gptq' but was not"):
        model.save(tmp_path / "model.keras")


def attention_block(attention):
    """A block that Keras calibrates: it calls it with one argument."""

    class Block(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.attention = attention

        def call(self, inputs):
            return self.attention(inputs, inputs)

    return Block()


@pytest.mark.skipif(EARLIER, reason="Keras 3.12 has no filters")
def test_filters_and_modes_of_quantizing_an_adapted_model():
    model, *_ = float_model()
    with pytest.raises(ValueError, match="'float8'"):
        model.quantize("float8")
    assert all(layer.quantization_mode is None for layer in model.layers)
    model.quantize("int8", filters="hid")
    found = {layer.name for layer in model.layers if layer.quantization_mode}
    assert found == {"hidden"}


def test_layers_that_were_constructed_with_an_adapter_are_quantized():
    model = keras.Sequential([keras.Input((6,)), keras_lora.LoRADense(3, rank=2)])
    inputs = np.random.default_rng(0).standard_normal((4, 6)).astype("float32")
    fill(model.layers[0].lora.b, 9)
    before = predict(model, inputs)
    model.quantize("int8")
    assert model.layers[0].quantization_mode == "int8"
    assert 0 < np.abs(predict(model, inputs) - before).max() < 0.1


def test_models_to_extract_an_adapter_from_are_float():
    models = [keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])] * 2
    models[0].layers[0].quantize("int8")
    with pytest.raises(ValueError, match=r"'dense' of .* is quantized"):
        keras_lora.extract_adapter(*models, rank=2)


@pytest.mark.parametrize("target", ["all-linear", ["token_embedding", "query"]])
def test_the_gradient_of_a_quantized_language_model_is_the_float_models(target):
    """Keras's own, through its int8 head, has a cosine of 0.26 with it."""
    keras_hub = pytest.importorskip("keras_hub")
    found = []
    for mode in (None, "int8"):
        set_seed(1)
        backbone = keras_hub.models.GPT2Backbone(
            vocabulary_size=60,
            num_layers=2,
            num_heads=2,
            hidden_dim=16,
            intermediate_dim=32,
            max_sequence_length=8,
            dropout=0.0,
        )
        model = keras_hub.models.GPT2CausalLM(backbone=backbone, preprocessor=None)
        if mode:
            model.quantize(mode)
        keras_lora.apply_lora(model, rank=2, target=target)
        layers = adapted_sites(model)
        for seed, layer in enumerate(layers):
            fill(layer.lora.a, seed, scale=0.1)
            fill(layer.lora.b, seed + 50, scale=0.1)
        before = [to_numpy(v) for v in model.trainable_variables]
        ids = np.random.default_rng(0).integers(0, 60, (4, 8)).astype("int32")
        batch = {"token_ids": ids, "padding_mask": np.ones((4, 8), "int32")}
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        # A step of plain descent is the gradient.
        model.compile(keras.optimizers.SGD(1.0), loss, run_eagerly=True)
        model.train_on_batch(batch, np.roll(ids, -1, axis=1))
        moved = zip(model.trainable_variables, before, strict=True)
        found.append(np.concatenate([np.ravel(to_numpy(v) - old) for v, old in moved]))
    assert cosine(*found) > 0.99


def small_gpt2(keras_hub):
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=20,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=8,
        max_sequence_length=4,
    )
    return keras_hub.models.GPT2CausalLM(backbone=backbone, preprocessor=None)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`compile\\(\\)` was not called")  # KerasHub's
@over_blocks
def test_a_preset_that_is_quantized_is_adapted_and_merged(tmp_path):
    """There the model holds the policies of its layers."""
    keras_hub = pytest.importorskip("keras_hub")
    task = small_gpt2(keras_hub)
    task.quantize("int4")
    task.save_to_preset(tmp_path)
    model = keras_hub.models.CausalLM.from_preset(str(tmp_path), preprocessor=None)
    ids = np.random.default_rng(0).integers(0, 20, (2, 4)).astype("int32")
    batch = {"token_ids": ids, "padding_mask": np.ones((2, 4), "int32")}
    before = predict(model, batch)
    keras_lora.apply_lora(model, rank=2)
    for _ in range(2):  # Keras saves a model that was loaded as if it were in float
        model.save(tmp_path / "model.keras")
        model = keras.saving.load_model(tmp_path / "model.keras")
        np.testing.assert_array_equal(predict(model, batch), before)
    keras_lora.remove_lora(model)
    for way in ("requantize", "dequantize"):
        keras_lora.apply_lora(model, rank=2, target=["query", "token_embedding"])
        np.testing.assert_array_equal(predict(model, batch), before)
        report = keras_lora.merge_lora(model, quantized=way)
        assert max(row.error for row in report) < 1e-4
        close(predict(model, batch), before, 0.05)  # whose inputs it may round
        wanted = "int4" if way == "requantize" else None
        assert {row.layer.quantization_mode for row in report} == {wanted}
        before = predict(model, batch)
        model.save(tmp_path / "model.keras")  # under the policies of its layers now
        again = keras.saving.load_model(tmp_path / "model.keras")
        np.testing.assert_array_equal(predict(again, batch), before)


@pytest.mark.filterwarnings("ignore:`compile\\(\\)` was not called")  # KerasHub's
@pytest.mark.skipif(EARLIER, reason="Keras 3.12 has no int8 of weights alone")
def test_a_loaded_model_quantizes_inputs_where_the_saved_one_did(tmp_path):
    """The policies of KerasHub's models do not say it."""
    model = small_gpt2(pytest.importorskip("keras_hub"))
    model.quantize("int8", config=MODES["int8 weights"]())
    keras_lora.apply_lora(model, rank=2)
    for seed, layer in enumerate(adapted_sites(model)):
        fill(layer.lora.b, seed, scale=0.3)
    ids = np.random.default_rng(0).integers(0, 20, (2, 4)).astype("int32")
    batch = {"token_ids": ids, "padding_mask": np.ones((2, 4), "int32")}
    wanted = predict(model, batch)
    for _ in range(2):
        model.save(tmp_path / "model.keras")
        model = keras.saving.load_model(tmp_path / "model.keras")
        np.testing.assert_array_equal(predict(model, batch), wanted)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="reads its graph")
@over_modes
def test_a_compiled_step_forms_each_float_kernel_when_its_turn_comes(mode):
    """Neither all at the start, nor kept from forward to backward."""
    import tensorflow as tf

    layer = keras.layers.Dense(48, name="host")
    model = keras.Sequential([keras.Input((64,)), layer])
    quantize(layer, mode)
    keras_lora.apply_lora(model, rank=2, target=["host"])

    @tf.function
    def step(x, upstream):
        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs = layer(x, training=True)
        return tape.gradient(outputs, x, output_gradients=upstream)

    shapes = tf.TensorSpec((2, 64)), tf.TensorSpec((2, 48))
    graph = step.get_concrete_function(*shapes).graph
    x, upstream = (tensor.op for tensor in graph.inputs[:2])

    def needs(op):
        found, waiting = set(), [op]
        while waiting:
            op = waiting.pop()
            if op not in found:
                found.add(op)
                waiting += [*(t.op for t in op.inputs), *op.control_inputs]
        return found

    large = [
        needs(op)
        for op in graph.get_operations()
        if any(
            t.dtype.is_floating and t.shape.num_elements() == 3072 for t in op.outputs
        )
    ]
    assert all({x, upstream} & found for found in large)
    assert any(upstream in found for found in large)
