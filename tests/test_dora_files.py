"""Adapter files of DoRA: both ways with PEFT, run live, and what is refused."""

import keras
import numpy as np
import peft
import pytest
import safetensors.numpy
import test_name_tables as tables
import torch
from layer_cases import CASES, fill, to_numpy
from test_peft_exchange import NAMES, assert_same, ids, pair

import keras_lora
from keras_lora.files.disk import PEFT_PREFIX, TENSORS
from keras_lora.models.sites import adapted_sites

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
TARGET = ["tokens", "query", "output", "conv", "up"]
OF_LINEAR = ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"]


def trained(model):
    for seed, weight in enumerate(model.trainable_weights):
        fill(weight, seed, 0.3)


def trained_by_peft(module, **settings):
    settings = {"r": 2, "lora_alpha": 5, "use_dora": True, **settings}
    adapted = peft.get_peft_model(module, peft.LoraConfig(**settings)).eval()
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) * 0.3 + 0.1)
    return adapted


def values_of(model):
    return [to_numpy(weight) for weight in model.weights]


def test_peft_loads_ours(tmp_path):
    model, module = pair()
    keras_lora.apply_lora(model, rank=3, alpha=5, target=TARGET, use_dora=True)
    trained(model)
    keras_lora.save_adapter(model, tmp_path, names=NAMES)
    loaded = tables.loaded_by_peft(module, tmp_path)
    assert_same(model, loaded)
    assert_same(model, loaded.merge_and_unload())


def test_we_load_what_peft_saved(tmp_path):
    """Into a plain model, and again over the adapters; then merged."""
    model, module = pair()
    before = to_numpy(model(ids()))
    target = ["tokens", "q", "o", "conv", "up"]
    trained_by_peft(module, target_modules=target).save_pretrained(tmp_path)
    adapted = tables.loaded_by_peft(pair()[1], tmp_path).eval()
    for _ in range(2):
        keras_lora.load_adapter(model, tmp_path, names=NAMES)
        assert np.abs(to_numpy(model(ids())) - before).max() > 0.1
        assert_same(model, adapted)
        for layer in adapted_sites(model):
            fill(layer.lora.magnitude, 9)
    keras_lora.load_adapter(model, tmp_path, names=NAMES)
    keras_lora.merge_lora(model)
    assert_same(model, adapted)


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_convolutions(ndim, tmp_path):
    inputs = keras.Input((5,) * ndim + (4,))
    layer = getattr(keras.layers, f"Conv{ndim}D")(6, 3, name="conv")
    model = keras.Model(inputs, keras.layers.Flatten()(layer(inputs)))
    base = getattr(torch.nn, f"Conv{ndim}d")(4, 6, 3)
    base.weight.data = torch.tensor(
        np.ascontiguousarray(np.moveaxis(to_numpy(layer.kernel), (-1, -2), (0, 1)))
    )
    base.bias.data = torch.zeros(6)
    module = torch.nn.ModuleDict({"conv": base})
    keras_lora.apply_lora(model, target=["conv"], rank=2, alpha=3, use_dora=True)
    trained(model)
    keras_lora.save_adapter(model, tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(module, tmp_path / "ours")
    x = np.random.default_rng(1).standard_normal((2, *[5] * ndim, 4)).astype("float32")
    expected = to_numpy(layer(x))
    theirs = loaded.base_model.model["conv"](torch.tensor(np.moveaxis(x, -1, 1)))
    theirs = np.moveaxis(theirs.detach().numpy(), 1, -1)
    np.testing.assert_allclose(expected, theirs, rtol=0, atol=1e-5)
    loaded.save_pretrained(tmp_path / "theirs")
    keras_lora.remove_lora(model)
    keras_lora.load_adapter(model, tmp_path / "theirs")
    np.testing.assert_allclose(to_numpy(layer(x)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if "loralib" not in case.name],
    ids=lambda case: case.name,
)
def test_what_was_saved_comes_back(case, tmp_path):
    model = case.model(use_dora=True, name="layer")
    other = case.model(use_dora=True, name="layer")
    layer, twin = model.layers[0], other.layers[0]
    for seed, variable in enumerate(layer.lora.named_factors().values()):
        fill(variable, seed)
    for ours, theirs in zip(model.layers[0].variables, twin.variables, strict=True):
        theirs.assign(ours)
    expected = [to_numpy(v) for v in layer.lora.named_factors().values()]
    keras_lora.save_adapter(model, tmp_path)
    for variable in twin.lora.named_factors().values():
        variable.assign(np.ones(variable.shape))
    keras_lora.load_adapter(other, tmp_path)
    for value, found in zip(expected, twin.lora.named_factors().values(), strict=True):
        np.testing.assert_array_equal(value, to_numpy(found))


@pytest.mark.parametrize("table", ["bert", "gpt2", "llama"])
def test_name_tables(table, tmp_path):
    """GPT-2's query, key and value are one c_attn there, with one m."""
    module, model = tables.pair(table, tmp_path / "base")
    again = tables.MODELS[table][2].from_preset(str(tmp_path / "base"))
    target = tables.targets(table)
    keras_lora.apply_lora(model, rank=2, alpha=7, target=target, use_dora=True)
    moved(model)
    keras_lora.save_adapter(model, tmp_path / "adapter", names=table)
    loaded = tables.loaded_by_peft(module, tmp_path / "adapter")
    tables.assert_same(table, model, loaded)
    keras_lora.load_adapter(again, tmp_path / "adapter", names=table)
    expected = tables.ours(table, model)
    np.testing.assert_allclose(tables.ours(table, again), expected, atol=1e-6)


def moved(model):
    for seed, layer in enumerate(adapted_sites(model)):
        fill(layer.lora.a, seed, 0.2)
        fill(layer.lora.b, seed + 50, 0.2)
        m = layer.lora.magnitude
        m.assign(to_numpy(m) * (1 + 0.3 * np.random.default_rng(seed).random(m.shape)))


def test_we_load_the_c_attn_that_peft_saved(tmp_path):
    module, model = tables.pair("gpt2", tmp_path / "base")
    settings = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    adapted = trained_by_peft(module, **settings)
    adapted.save_pretrained(tmp_path / "adapter")
    keras_lora.load_adapter(model, tmp_path / "adapter", names="gpt2")
    tables.assert_same("gpt2", model, adapted)


def test_slices_without_an_adapter_keep_their_length(tmp_path):
    module, model = tables.pair("gpt2", tmp_path / "base")
    again = tables.MODELS["gpt2"][2].from_preset(str(tmp_path / "base"))
    keras_lora.apply_lora(model, rank=2, target=["query", "value"], use_dora=True)
    moved(model)
    keras_lora.save_adapter(model, tmp_path / "adapter", names="gpt2")
    tables.assert_same(
        "gpt2", model, tables.loaded_by_peft(module, tmp_path / "adapter")
    )
    expected = tables.ours("gpt2", model)
    for _ in range(2):
        keras_lora.load_adapter(again, tmp_path / "adapter", names="gpt2")
        found = tables.ours("gpt2", again)
        np.testing.assert_allclose(found, expected, atol=1e-6)
    adapter = keras_lora.Adapter.read(tmp_path / "adapter")
    key = next(key for key in adapter.tensors if key.endswith("c_attn." + OF_LINEAR[2]))
    size = len(adapter.tensors[key]) // 3
    changed = adapter.tensors[key].copy()
    changed[size] *= 1.01  # of a key
    broken = keras_lora.Adapter(
        adapter.tensors | {key: changed}, adapter.config, adapter.slices
    )
    before = values_of(again)
    with pytest.raises(ValueError, match="would change the model's kernel"):
        keras_lora.load_adapter(again, broken, names="gpt2")
    for old, new in zip(before, values_of(again), strict=True):
        np.testing.assert_array_equal(old, new)


def test_merged_dense_is_one_linear_module(tmp_path):
    layer = keras_lora.LoRAMergedDense(
        12, enable_lora=(True, False, True), rank=2, use_dora=True, name="qkv"
    )
    model = keras.Sequential([keras.Input((6,)), layer])
    trained(model)
    module = torch.nn.ModuleDict({"qkv": torch.nn.Linear(6, 12)})
    module["qkv"].weight.data = torch.tensor(to_numpy(layer.kernel).T.copy())
    module["qkv"].bias.data = torch.tensor(to_numpy(layer.bias))
    keras_lora.save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(module, tmp_path)
    x = np.random.default_rng(1).standard_normal((3, 6)).astype("float32")
    theirs = loaded.base_model.model["qkv"](torch.tensor(x)).detach().numpy()
    np.testing.assert_allclose(to_numpy(model(x)), theirs, rtol=0, atol=1e-5)
    layer.frozen_kernel.assign(to_numpy(layer.frozen_kernel) * 1.5)
    with pytest.raises(ValueError, match="outputs that the layer does not adapt"):
        keras_lora.load_adapter(model, tmp_path)


# What is refused, with nothing changed.


def small(**lora):
    inputs = keras.Input((6,))
    x = keras.layers.Dense(5, name="dense")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(x))
    if lora:
        keras_lora.apply_lora(model, rank=2, target=["dense"], **lora)
        trained(model)
    return model


def refused(model, folder, match):
    before, classes = values_of(model), [type(layer) for layer in model.layers]
    with pytest.raises(ValueError, match=match):
        keras_lora.load_adapter(model, folder)
    assert [type(layer) for layer in model.layers] == classes
    for old, new in zip(before, values_of(model), strict=True):
        np.testing.assert_array_equal(old, new)


def changed(folder, change):
    """A file of PEFT's: no checksum."""
    tensors = safetensors.numpy.load_file(folder / TENSORS)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / TENSORS, {"format": "pt"})


KEY = f"{PEFT_PREFIX}dense.lora_magnitude_vector"


@pytest.mark.parametrize("already", [False, True])
@pytest.mark.parametrize(
    "change, match",
    [
        (lambda x: x.pop(KEY), "needs A and B, as"),
        (lambda x: x.update({KEY: x[KEY][:-1].copy()}), "has shape"),
        (lambda x: x.update({KEY: x[KEY][None].copy()}), "has shape"),
        (lambda x: x.update({KEY: x[KEY] * np.nan}), "not finite"),
        (lambda x: x.update({KEY.replace("dense", "head"): x[KEY]}), "needs A and B"),
        (lambda x: x.update({f"{KEY}.weight": x[KEY] + 1}), "which differ"),
        (lambda x: x.pop(KEY.replace("magnitude_vector", "A.weight")), "needs A and B"),
    ],
)
def test_damaged_files(change, match, already, tmp_path):
    keras_lora.save_adapter(small(use_dora=True), tmp_path)
    changed(tmp_path, change)
    refused(small(use_dora=True) if already else small(), tmp_path, match)


@pytest.mark.parametrize("end", [".weight", ".default.weight", ".default"])
def test_all_keys_of_peft(end, tmp_path):
    model, again = small(use_dora=True), small()
    for ours, theirs in zip(model.layers[1:], again.layers[1:], strict=True):
        weights = {v.name: v for v in ours.variables}
        for variable in theirs.variables:
            variable.assign(weights[variable.name])
    keras_lora.save_adapter(model, tmp_path)
    changed(tmp_path, lambda x: x.update({KEY + end: x.pop(KEY)}))
    keras_lora.load_adapter(again, tmp_path)
    x = np.ones((1, 6))
    np.testing.assert_array_equal(to_numpy(again(x)), to_numpy(model(x)))


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_file_of_the_other_method(use_dora, tmp_path):
    keras_lora.save_adapter(small(use_dora=use_dora), tmp_path)
    refused(small(use_dora=not use_dora), tmp_path, "Call remove_lora")


def test_both_methods_in_one_model(tmp_path):
    layers = [keras_lora.LoRADense(3, rank=1, use_dora=x) for x in (True, False)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    with pytest.raises(ValueError, match="several methods"):
        keras_lora.save_adapter(model, tmp_path / "adapter")


def test_combining_is_refused_and_extracting_after_a_merge_is_not(tmp_path):
    model, base = small(use_dora=True), small()
    base.set_weights(
        [to_numpy(getattr(model.get_layer(n), w)) for n, w in LAYERS_AND_WEIGHTS]
    )
    keras_lora.save_adapter(model, tmp_path / "dora")
    with pytest.raises(ValueError, match="extract_adapter"):
        keras_lora.combine_adapters([tmp_path / "dora"] * 2)
    x = np.random.default_rng(1).standard_normal((4, 6)).astype("float32")
    expected = to_numpy(model(x))
    keras_lora.merge_lora(model)
    adapter = keras_lora.extract_adapter(base, model, rank=5)
    combined = keras_lora.combine_adapters([adapter])
    keras_lora.load_adapter(base, combined)
    np.testing.assert_allclose(to_numpy(base(x)), expected, atol=1e-5)


LAYERS_AND_WEIGHTS = [
    (name, weight) for name in ("dense", "head") for weight in ("kernel", "bias")
]
