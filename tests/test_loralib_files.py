"""lora_state_dict of loralib, run live, into the layers here."""

import keras
import loralib
import numpy as np
import pytest
import torch
from layer_cases import to_numpy

import keras_lora

MASK = (True, False, True)


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
    ids = np.random.default_rng(1).integers(0, 11, (4, 3, 3)).astype("int32")
    theirs = module(torch.tensor(ids).long()).detach().numpy()
    np.testing.assert_allclose(to_numpy(model(ids)), theirs, rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        to_numpy(model(ids, training=True)), theirs, rtol=0, atol=1e-5
    )
    assert {row.alpha for row in report} == {3}


def test_biases_are_read():
    module, model = pair()
    with torch.no_grad():
        module.out.bias += 1
    state = {
        key: value
        for key, value in state_of(module, "lora_only").items()
        if not key.startswith("conv.conv")
    }
    keras_lora.load_loralib(model, state, rank=2, alpha=3)
    np.testing.assert_array_equal(
        to_numpy(model.get_layer("out").bias), module.out.bias.detach().numpy()
    )


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
        match = r"'more\.lora_A', which the model has not"
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
