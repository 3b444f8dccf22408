"""Adapters trained here and loaded by PEFT on torch, and the reverse, run live."""

import json
import warnings

import keras
import numpy as np
import peft
import pytest
import torch
from layer_cases import fill, to_numpy
from seeds import set_seed

import keras_lora
from keras_lora.files.config import CONFIG
from keras_lora.models.sites import adapted_sites

# path here -> module there
NAMES = {
    "tokens": "tokens",
    "query": "q",
    "output": "o",
    "conv": "conv",
    "up": "mlp.up",
    "head": "head",
}


def ours():
    ids = keras.Input((6,), dtype="int32")
    x = keras.layers.Embedding(11, 8, name="tokens")(ids)
    query = keras.layers.EinsumDense(
        "abc,cde->abde", (6, 2, 5), bias_axes="de", name="query"
    )
    output = keras.layers.EinsumDense(
        "abcd,cde->abe", (6, 8), bias_axes="e", name="output"
    )
    x = x + output(keras.layers.Activation("tanh")(query(x)))
    x = keras.layers.Conv1D(7, 3, padding="valid", name="conv")(x)
    x = keras.layers.Flatten()(x)
    x = keras.layers.Dense(9, activation="tanh", name="up")(x)
    return keras.Model(ids, keras.layers.Dense(3, name="head")(x))


class Theirs(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = torch.nn.Embedding(11, 8)
        self.q = torch.nn.Linear(8, 10)
        self.o = torch.nn.Linear(10, 8)
        self.conv = torch.nn.Conv1d(8, 7, 3)
        self.mlp = torch.nn.ModuleDict({"up": torch.nn.Linear(28, 9)})
        self.head = torch.nn.Linear(9, 3)

    def forward(self, ids):
        x = self.tokens(ids)
        x = x + self.o(torch.tanh(self.q(x)))
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.head(torch.tanh(self.mlp["up"](x.flatten(1))))


def pair():
    """Both frameworks' models with the same weights."""
    set_seed(1)
    model, module = ours(), Theirs()

    def put(parameter, value):
        parameter.data = torch.tensor(np.ascontiguousarray(to_numpy(value)))

    layer = {name: model.get_layer(name) for name in NAMES}
    for seed, name in enumerate(NAMES):
        if name != "tokens":
            fill(layer[name].bias, seed, 0.3)
    put(module.tokens.weight, layer["tokens"].embeddings)
    for linear, name in (
        (module.q, "query"),
        (module.o, "output"),
        (module.mlp["up"], "up"),
        (module.head, "head"),
    ):
        put(
            linear.weight, to_numpy(layer[name].kernel).reshape(linear.weight.T.shape).T
        )
        put(linear.bias, to_numpy(layer[name].bias).reshape(-1))
    put(module.conv.weight, to_numpy(layer["conv"].kernel).transpose(2, 1, 0))
    put(module.conv.bias, layer["conv"].bias)
    assert_same(model, module)
    return model, module


def ids():
    return np.random.default_rng(2).integers(0, 11, (4, 6)).astype("int32")


def assert_same(model, module):
    theirs = module(torch.tensor(ids()).long()).detach().numpy()
    np.testing.assert_allclose(to_numpy(model(ids())), theirs, rtol=0, atol=1e-5)
    return theirs


SETTINGS = [
    {"rank": 3, "alpha": 5},
    {"rank": 4, "alpha": 3, "use_rslora": True, "bias": "lora_only"},
    {
        "rank": 2,
        "bias": "all",
        "rank_pattern": {"up": 4},
        "alpha_pattern": {"query": 7},
    },
    {"rank": 2, "alpha": 9, "also_train": ["head"]},
]
over_settings = pytest.mark.parametrize("settings", SETTINGS, ids=str)


@over_settings
def test_peft_loads_ours(settings, tmp_path):
    model, module = pair()
    before = to_numpy(model(ids()))
    target = ["tokens", "query", "output", "conv", "up"]
    keras_lora.apply_lora(model, target=target, **settings)
    for seed, weight in enumerate(model.trainable_weights):
        fill(weight, seed, 0.3)
    keras_lora.save_adapter(model, tmp_path, names=NAMES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = peft.PeftModel.from_pretrained(module, tmp_path)
    assert np.abs(to_numpy(model(ids())) - before).max() > 0.1
    assert_same(model, loaded)
    assert_same(model, loaded.merge_and_unload())


@over_settings
def test_we_load_what_peft_saved(settings, tmp_path):
    model, module = pair()
    words = {"rank": "r", "alpha": "lora_alpha", "also_train": "modules_to_save"}
    config = {words.get(key, key): value for key, value in settings.items()}
    config["rank_pattern"] = {
        NAMES[key]: value for key, value in config.pop("rank_pattern", {}).items()
    }
    config["alpha_pattern"] = {
        NAMES[key]: value for key, value in config.pop("alpha_pattern", {}).items()
    }
    target = ["tokens", "q", "o", "conv", "up"]
    adapted = peft.get_peft_model(
        module, peft.LoraConfig(target_modules=target, **config)
    )
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    adapted.eval()
    adapted.save_pretrained(tmp_path)
    report = keras_lora.load_adapter(model, tmp_path, names=NAMES)
    assert len(report) == 5
    assert_same(model, adapted)
    assert json.loads((tmp_path / CONFIG).read_text())["peft_type"] == "LORA"
    keras_lora.merge_lora(model)
    assert_same(model, adapted)


def test_heads_that_peft_names_by_their_end(tmp_path):
    model, module = pair()
    config = peft.LoraConfig(r=2, target_modules=["q"], modules_to_save=["up"])
    adapted = peft.get_peft_model(module, config).eval()
    with torch.no_grad():
        adapted.base_model.model.mlp["up"].modules_to_save["default"].weight += 0.2
    adapted.save_pretrained(tmp_path)
    keras_lora.load_adapter(model, tmp_path, names=NAMES)
    assert_same(model, adapted)
    assert model.get_layer("up").trainable_weights


@pytest.mark.parametrize("ndim", [2, 3])
def test_convolutions(ndim, tmp_path):
    """Forth and back through PEFT, for the dimensions the model above has not."""
    inputs = keras.Input((5,) * ndim + (4,))
    layer = getattr(keras.layers, f"Conv{ndim}D")(6, 3, name="conv")
    model = keras.Model(inputs, keras.layers.Flatten()(layer(inputs)))
    module = torch.nn.ModuleDict(
        {"conv": getattr(torch.nn, f"Conv{ndim}d")(4, 6, 3, bias=True)}
    )
    module["conv"].weight.data = torch.tensor(
        np.ascontiguousarray(np.moveaxis(to_numpy(layer.kernel), (-1, -2), (0, 1)))
    )
    module["conv"].bias.data = torch.zeros(6)
    keras_lora.apply_lora(model, target=["conv"], rank=2, alpha=3)
    fill(layer.lora.b, 1)
    keras_lora.save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(module, tmp_path)
    x = np.random.default_rng(1).standard_normal((2, *[5] * ndim, 4)).astype("float32")
    theirs = loaded.base_model.model["conv"](torch.tensor(np.moveaxis(x, -1, 1)))
    theirs = np.moveaxis(theirs.detach().numpy(), 1, -1)
    np.testing.assert_allclose(to_numpy(layer(x)), theirs, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:LoRA adapter added")
def test_grouped_convolution_of_peft_is_refused(tmp_path):
    module = torch.nn.ModuleDict({"conv": torch.nn.Conv2d(4, 6, 3, groups=2)})
    config = peft.LoraConfig(r=2, target_modules=["conv"])
    peft.get_peft_model(module, config).save_pretrained(tmp_path)
    inputs = keras.Input((5, 5, 4))
    layer = keras.layers.Conv2D(6, 3, groups=2, name="conv")
    model = keras.Model(inputs, keras.layers.Flatten()(layer(inputs)))
    with pytest.raises(ValueError, match="has groups"):
        keras_lora.load_adapter(model, tmp_path)
    assert adapted_sites(model) == []


def test_bfloat16_file_of_peft(tmp_path):
    model, module = pair()
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["up"])
    adapted = peft.get_peft_model(module, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                values = torch.randn(parameter.shape) * 0.3
                parameter.copy_(values.bfloat16())
    state = {
        key: value.bfloat16()
        for key, value in peft.get_peft_model_state_dict(adapted).items()
    }
    adapted.save_pretrained(tmp_path, state_dict=state)
    keras_lora.load_adapter(model, tmp_path, names=NAMES)
    assert_same(model, adapted)


def test_merged_dense_is_one_fused_adapter(tmp_path):
    layer = keras_lora.LoRAMergedDense(
        12, enable_lora=(True, False, True), rank=2, alpha=3, name="qkv"
    )
    model = keras.Sequential([keras.Input((6,)), layer])
    fill(layer.lora.b, 1)
    module = torch.nn.ModuleDict({"qkv": torch.nn.Linear(6, 12)})
    module["qkv"].weight.data = torch.tensor(to_numpy(layer.kernel).T.copy())
    module["qkv"].bias.data = torch.zeros(12)
    keras_lora.save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(module, tmp_path)
    x = np.random.default_rng(1).standard_normal((3, 6)).astype("float32")
    theirs = loaded.base_model.model["qkv"](torch.tensor(x)).detach().numpy()
    np.testing.assert_allclose(to_numpy(model(x)), theirs, rtol=0, atol=1e-5)


class Bank(keras.layers.Layer):
    """y = sum over e of x @ w[e]"""

    def build(self, input_shape):
        self.w = self.add_weight(shape=(2, input_shape[-1], 4), name="w")

    def call(self, inputs):
        return keras.ops.einsum("bi,eio->bo", inputs, self.w)


class Others(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.up = torch.nn.LSTM(3, 4), torch.nn.ConvTranspose2d(3, 4, 2)
        self.depthwise = torch.nn.Conv2d(3, 3, 2, groups=3)
        self.bank = torch.nn.Module()
        self.bank.w = torch.nn.Parameter(torch.zeros(2, 3, 4))


@pytest.mark.parametrize(
    ("layer", "shape", "reason"),
    [
        (keras.layers.LSTM(4, name="lstm"), (5, 3), "Target modules .* not found"),
        (keras.layers.Conv2DTranspose(4, 2, name="up"), (5, 5, 3), "is not supported"),
        (keras.layers.DepthwiseConv2D(2, name="depthwise"), (5, 5, 3), "size mismatch"),
        (Bank(name="bank"), (3,), "is not supported"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
@pytest.mark.filterwarnings("ignore:LoRA adapter added")
def test_what_peft_has_no_adapter_for(layer, shape, reason, tmp_path):
    """It raises, as the page of adapter files says; here the file is read."""
    model = keras.Sequential([keras.Input(shape), layer])
    keras_lora.apply_lora(model, rank=3, target=[layer.name])
    for seed, weight in enumerate(model.trainable_weights):
        fill(weight, seed, 0.3)
    keras_lora.save_adapter(model, tmp_path)
    with pytest.raises((ValueError, RuntimeError), match=reason):
        peft.PeftModel.from_pretrained(Others(), tmp_path)
    x = np.random.default_rng(1).standard_normal((2, *shape)).astype("float32")
    expected = to_numpy(model(x))
    keras_lora.remove_lora(model)
    keras_lora.load_adapter(model, tmp_path)
    np.testing.assert_array_equal(to_numpy(model(x)), expected)
