"""lora_state_dict of loralib, run live, into the layers here."""

import keras
import loralib
import numpy as np
import pytest
import safetensors.torch
import torch
from layer_cases import fill, to_numpy

import keras_lora

MASK = (True, False, True)

# Keras's own Dense multiplies float64 in float32 on the torch backend.
EXACT = 1e-5 if keras.backend.backend() == "torch" else 1e-12


class Theirs(torch.nn.Module):
    def __init__(self, fan_in_fan_out=False):
        super().__init__()
        self.tokens = loralib.Embedding(11, 8, r=2, lora_alpha=3)
        self.qkv = loralib.MergedLinear(
            8,
            12,
            r=2,
            lora_alpha=3,
            enable_lora=list(MASK),
            fan_in_fan_out=fan_in_fan_out,
        )
        self.conv = loralib.Conv2d(12, 4, 3, r=2, lora_alpha=3)
        self.out = loralib.Linear(4, 5, r=2, lora_alpha=3)

    def forward(self, ids):
        x = self.qkv(self.tokens(ids))  # (batch, 3, 3, 12)
        x = self.conv(x.permute(0, 3, 1, 2))
        return self.out(x.flatten(1))


def ours():
    lora = {"rank": 2, "alpha": 77}
    conv = {**lora, "factorization": "loralib", "name": "conv"}
    return keras.Sequential(
        [
            keras.Input((3, 3), dtype="int32"),
            keras_lora.LoRAEmbedding(11, 8, name="tokens", **lora),
            keras_lora.LoRAMergedDense(12, enable_lora=MASK, name="qkv", **lora),
            keras_lora.LoRAConv2D(4, 3, **conv),
            keras.layers.Flatten(),
            keras_lora.LoRADense(5, name="out", **lora),
        ]
    )


def pair(fan_in_fan_out=False):
    torch.manual_seed(1)
    module, model = Theirs(fan_in_fan_out), ours()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    value = {name: p.detach().numpy() for name, p in module.named_parameters()}
    model.get_layer("tokens").embeddings.assign(value["tokens.weight"])
    qkv = value["qkv.weight"]
    model.get_layer("qkv").kernel.assign(qkv if fan_in_fan_out else qkv.T)
    model.get_layer("conv").kernel.assign(
        value["conv.conv.weight"].transpose(2, 3, 1, 0)
    )
    model.get_layer("out").kernel.assign(value["out.weight"].T)
    model.get_layer("conv").bias.assign(value["conv.conv.bias"])
    for name in ("qkv", "out"):
        model.get_layer(name).bias.assign(value[f"{name}.bias"])
    return module, model


def state_of(module, bias="none"):
    return loralib.lora_state_dict(module, bias=bias)


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_outputs_agree(fan_in_fan_out):
    module, model = pair(fan_in_fan_out)
    report = keras_lora.load_loralib(model, state_of(module), rank=2, alpha=3)
    assert_agrees(model, module)
    assert {row.alpha for row in report} == {3}


def plain():
    """The same network of plain Keras layers."""
    return keras.Sequential(
        [
            keras.Input((3, 3), dtype="int32"),
            keras.layers.Embedding(11, 8, name="tokens"),
            keras.layers.Dense(12, name="qkv"),
            keras.layers.Conv2D(4, 3, name="conv"),
            keras.layers.Flatten(),
            keras.layers.Dense(5, name="out"),
        ]
    )


def assert_agrees(model, module):
    ids = np.random.default_rng(1).integers(0, 11, (4, 3, 3)).astype("int32")
    theirs = module(torch.tensor(ids).long()).detach().numpy()
    for training in (False, True):
        outputs = to_numpy(model(ids, training=training))
        np.testing.assert_allclose(outputs, theirs, rtol=0, atol=1e-5)


def plain_pair():
    module, adapted = pair()
    model = plain()
    keras_lora.remove_lora(adapted)
    model.set_weights(adapted.get_weights())
    return module, model


@pytest.mark.parametrize("enable_lora", [MASK, {"qkv": MASK}])
def test_plain_layers_are_adapted(enable_lora):
    """MergedLinear at rank G * r, a convolution at r * k * k: exactly."""
    module, model = plain_pair()
    report = keras_lora.load_loralib(
        model, state_of(module), rank=2, alpha=3, enable_lora=enable_lora
    )
    assert_agrees(model, module)
    ranks = {row.path: row.rank for row in report}
    assert ranks == {"tokens": 2, "qkv": 4, "conv": 18, "out": 2}
    assert all(row.scaling == pytest.approx(1.5) for row in report)


def test_all_slices_need_no_mask():
    torch.manual_seed(2)
    layer = loralib.MergedLinear(6, 9, r=2, enable_lora=[True] * 3)
    layer.lora_B.data = torch.randn(layer.lora_B.shape)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(9, name="qkv")])
    model.layers[0].kernel.assign(layer.weight.detach().numpy().T)
    model.layers[0].bias.assign(layer.bias.detach().numpy())
    state = {f"qkv.{key}": value for key, value in layer.state_dict().items()}
    state = {key: value for key, value in state.items() if "lora_" in key}
    keras_lora.load_loralib(model, state, rank=2)
    x = np.random.default_rng(1).standard_normal((3, 6)).astype("float32")
    theirs = layer(torch.tensor(x)).detach().numpy()
    np.testing.assert_allclose(to_numpy(model(x)), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kernel_size", [(3,), (1, 3), (3, 1), (2, 3, 4)])
def test_standard_convolution_holds_loralibs_update(kernel_size):
    """Against (B @ A).view of the kernel, in float64, for every shape."""
    channels, filters, rank, random = 6, 5, 2, np.random.default_rng(1)
    last, others = kernel_size[-1], int(np.prod(kernel_size[:-1]))
    a = random.standard_normal((rank * last, channels * last))
    b = random.standard_normal((filters * others, rank * last))
    expected = (b @ a).reshape(filters, channels, *kernel_size) * 3 / rank
    ndim = len(kernel_size)
    layer = getattr(keras.layers, f"Conv{ndim}D")(
        filters, kernel_size, name="conv", dtype="float64"
    )
    model = keras.Sequential([keras.Input((4,) * ndim + (channels,)), layer])
    state = {"conv.lora_A": a, "conv.lora_B": b}
    keras_lora.load_loralib(model, state, rank=rank, alpha=3)
    delta = np.moveaxis(to_numpy(layer.lora.delta()), (-1, -2), (0, 1))
    np.testing.assert_allclose(delta, expected, rtol=EXACT, atol=EXACT)
    assert layer.lora.rank == rank * last * others


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_files(ending, tmp_path):
    module, model = pair()
    path = tmp_path / f"lora.{ending}"
    if ending == "pt":
        torch.save(state_of(module), path)
    else:
        safetensors.torch.save_file(dict(state_of(module)), path)
    keras_lora.load_loralib(model, path, rank=2, alpha=3)
    assert_agrees(model, module)
    before = [to_numpy(weight) for weight in model.weights]
    whole = path.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"no such format" * 9):
        path.write_bytes(content)
        with pytest.raises((ValueError, OSError)):
            keras_lora.load_loralib(model, str(path), rank=2, alpha=3)
    with pytest.raises(OSError):
        keras_lora.load_loralib(model, tmp_path / f"no.{ending}", rank=2, alpha=3)
    for old, new in zip(before, model.weights, strict=True):
        np.testing.assert_array_equal(old, to_numpy(new))


class Harm:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle ran')",))


def test_a_pickle_is_never_run(tmp_path):
    torch.save({"out.lora_A": Harm()}, tmp_path / "lora.pt")
    with pytest.raises(ValueError, match="holds no usable state dict"):
        keras_lora.load_loralib(ours(), tmp_path / "lora.pt", rank=2)


@pytest.mark.parametrize("build", [pair, plain_pair])
@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_are_read(bias, build):
    module, model = build()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                parameter += 1
    mask = None if build is pair else MASK
    keras_lora.load_loralib(
        model, state_of(module, bias), rank=2, alpha=3, enable_lora=mask
    )
    # loralib's own "lora_only" leaves out the bias inside its convolution
    if bias == "lora_only":
        assert "conv.conv.bias" not in state_of(module, bias)
        module.conv.conv.bias.data -= 1
    assert_agrees(model, module)


@pytest.mark.parametrize("damage", ["missing", "more", "shape", "nan", "rank", "alpha"])
def test_bad_input_changes_nothing(damage):
    module, model = pair()
    state, settings = dict(state_of(module)), {"rank": 2, "alpha": 3}
    match = damage
    if damage == "missing":
        del state["out.lora_B"]
        match = r"no 'out\.lora_B'"
    elif damage == "more":
        state["more.lora_A"] = state["out.lora_A"]
        match = r"'more\.lora_A', which the model does not have"
    elif damage == "shape":
        state["out.lora_B"] = state["out.lora_B"][:-1]
    elif damage == "nan":
        state["out.lora_B"] = state["out.lora_B"] * float("nan")
        match = "not finite"
    else:
        settings[damage] = 3 if damage == "rank" else -1
    before = [to_numpy(weight) for weight in model.weights]
    with pytest.raises(ValueError, match=match):
        keras_lora.load_loralib(model, state, **settings)
    for old, new in zip(before, model.weights, strict=True):
        np.testing.assert_array_equal(old, to_numpy(new))
    assert model.get_layer("out").lora.alpha == 77


@pytest.mark.parametrize("ndim", [1, 2])
def test_convolution_in_float64(ndim):
    """As NumPy in float64 has it, in training too."""
    cls = {1: keras_lora.LoRAConv1D, 2: keras_lora.LoRAConv2D}[ndim]
    layer = cls(3, 2, rank=2, alpha=3, factorization="loralib", dtype="float64")
    x = np.random.default_rng(0).standard_normal((2, *[5] * ndim, 4))
    layer.build(x.shape)
    for seed, factor in enumerate((layer.lora.a, layer.lora.b)):
        fill(factor, seed, 0.3)
    a, b = to_numpy(layer.lora.a), to_numpy(layer.lora.b)
    assert a.dtype == b.dtype == "float64"
    delta = 1.5 * np.moveaxis((b @ a).reshape(3, 4, *[2] * ndim), (0, 1), (-1, -2))
    np.testing.assert_allclose(to_numpy(layer.lora.delta()), delta, rtol=1e-12)
    plain = getattr(keras.layers, f"Conv{ndim}D")(3, 2, dtype="float64")
    plain.build(x.shape)
    plain.set_weights([to_numpy(layer.frozen_kernel) + delta, to_numpy(layer.bias)])
    outputs = to_numpy(layer(x, training=True))
    np.testing.assert_allclose(outputs, to_numpy(plain(x)), rtol=0, atol=1e-12)
