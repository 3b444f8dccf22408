"""The same random weights in transformers and in KerasHub, adapters both ways."""

import json

import keras
import keras_hub
import numpy as np
import peft
import pytest
import torch
import transformers
from layer_cases import fill, to_numpy
from their_models import BERT, GEMMA, GPT2, SIZES, ids, loaded_by_peft, theirs

import keras_lora
from keras_lora.files.config import CONFIG

LLAMA = transformers.LlamaConfig(
    **SIZES, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24
)
# table: torch's class and configuration, KerasHub's class, a norm that trains
MODELS = {
    "bert": (transformers.BertModel, BERT, keras_hub.models.BertBackbone, "norm"),
    "gpt2": (transformers.GPT2LMHeadModel, GPT2, keras_hub.models.GPT2Backbone, "norm"),
    "llama": (
        transformers.LlamaForCausalLM,
        LLAMA,
        keras_hub.models.Llama3Backbone,
        "layernorm",
    ),
    "gemma": (
        transformers.GemmaForCausalLM,
        GEMMA,
        keras_hub.models.GemmaBackbone,
        "_norm",
    ),
}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
over_models = pytest.mark.parametrize("table", MODELS)


def pair(table, folder):
    """The transformers model, and the KerasHub backbone that reads its weights."""
    torch_class, config, backbone, _ = MODELS[table]
    torch.manual_seed(3)
    module = torch_class(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    module.save_pretrained(folder)
    return module.base_model, backbone.from_preset(str(folder))


def ours(table, model):
    mask = np.ones_like(ids())
    inputs = {"token_ids": ids(), "padding_mask": mask}
    if table == "bert":
        inputs["segment_ids"] = np.zeros_like(mask)
        return to_numpy(model(inputs)["sequence_output"])
    return to_numpy(model(inputs))


def assert_same(table, model, module):
    np.testing.assert_allclose(ours(table, model), theirs(module), rtol=0, atol=1e-5)


def targets(table):
    linear = ["query", "key", "value", "attention_output"]
    if table == "gemma":
        return [*linear, "ffw_gating", "ffw_gating_2", "ffw_linear"]
    dense = ["feedforward_intermediate_dense", "feedforward_output_dense"]
    return linear + dense + (["feedforward_gate_dense"] if table == "llama" else [])


@pytest.mark.parametrize(
    ("table", "bias"),
    [
        *((table, "all") for table in MODELS),
        *((table, "none") for table in ("bert", "gpt2", "gemma")),
        ("gpt2", "lora_only"),
    ],
)
def test_peft_loads_ours(table, bias, tmp_path):
    module, model = pair(table, tmp_path / "base")
    assert_same(table, model, module)
    before = ours(table, model)
    keras_lora.apply_lora(
        model,
        rank=2,
        alpha=7,
        target=targets(table),
        bias=bias,
        alpha_pattern={"query": 5},
        also_train=rf".*{MODELS[table][3]}" if bias == "none" else None,
    )
    for seed, weight in enumerate(model.trainable_weights):
        fill(weight, seed, 0.2)
    keras_lora.save_adapter(model, tmp_path / "adapter", names=table)
    loaded = loaded_by_peft(module, tmp_path / "adapter")
    assert np.abs(ours(table, model) - before).max() > 0.1
    assert_same(table, model, loaded)


@pytest.mark.parametrize(
    ("table", "use_rslora"),
    [*((table, True) for table in MODELS), ("gpt2", False)],
)
def test_what_was_saved_comes_back(table, use_rslora, tmp_path):
    _, model = pair(table, tmp_path / "base")
    again = MODELS[table][2].from_preset(str(tmp_path / "base"))
    target = [name for name in targets(table) if name != "key"]
    report = keras_lora.apply_lora(
        model, rank=2, alpha=7, target=target, use_rslora=use_rslora, bias="lora_only"
    )
    for seed, weight in enumerate(model.trainable_weights):
        fill(weight, seed, 0.2)
    keras_lora.save_adapter(model, tmp_path / "adapter", names=table)
    settings = [(row.path, row.rank, pytest.approx(row.alpha)) for row in report]
    for _ in range(2):  # onto the plain model, and over the adapters
        loaded = keras_lora.load_adapter(again, tmp_path / "adapter", names=table)
        assert [(row.path, row.rank, row.alpha) for row in loaded] == settings
        np.testing.assert_allclose(ours(table, again), ours(table, model), atol=1e-6)


@over_models
def test_we_load_what_peft_saved(table, tmp_path):
    module, model = pair(table, tmp_path / "base")
    modules = ["c_fc", "c_attn", "c_proj"]
    if table == "bert":
        modules = ["query", "key", "value", "dense", "word_embeddings"]
    elif table != "gpt2":
        modules = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(
        r=2,
        lora_alpha=5,
        target_modules=modules,
        bias="lora_only",
        fan_in_fan_out=table == "gpt2",
        exclude_modules=["pooler.dense"] if table == "bert" else None,
        alpha_pattern={modules[0]: 3},
    )
    adapted = peft.get_peft_model(module, config).eval()
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) * 0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    before = ours(table, model)
    keras_lora.load_adapter(model, tmp_path / "adapter", names=table)
    assert np.abs(ours(table, model) - before).max() > 0.1
    assert_same(table, model, adapted)
    if table == "gpt2":  # one A for all three slices goes back as one
        keras_lora.save_adapter(model, tmp_path / "again", names=table)
        again = json.loads((tmp_path / "again" / CONFIG).read_text())
        assert again["r"] == 2 and "rank_pattern" not in again


@over_models
def test_a_projection_that_trains_in_full(table, tmp_path):
    """Its kernel has heads here, and is one matrix there; GPT-2's is a third of one."""
    module, model = pair(table, tmp_path / "base")
    again = MODELS[table][2].from_preset(str(tmp_path / "base"))
    last = targets(table)[-1]
    keras_lora.apply_lora(
        model, target=[last], also_train=r".*_0/.*/(query|attention_output)"
    )
    for seed, weight in enumerate(model.trainable_weights):
        fill(weight, seed, 0.2)
    keras_lora.save_adapter(model, tmp_path / "adapter", names=table)
    keras_lora.load_adapter(again, tmp_path / "adapter", names=table)
    np.testing.assert_allclose(ours(table, again), ours(table, model), atol=1e-6)
    loaded = loaded_by_peft(module, tmp_path / "adapter")
    assert_same(table, model, loaded)


def test_task_models_have_a_prefix_and_a_head(tmp_path):
    config = transformers.BertConfig(**BERT.to_diff_dict() | {"num_labels": 3})
    _, backbone = pair("bert", tmp_path / "base")
    module = transformers.BertForSequenceClassification(config).eval()
    module.bert.load_state_dict(
        transformers.BertModel.from_pretrained(tmp_path / "base").state_dict()
    )
    model = keras_hub.models.BertTextClassifier(
        backbone, num_classes=3, preprocessor=None
    )
    keras_lora.apply_lora(
        model, rank=2, alpha=5, target=["query", "value"], also_train=["logits"]
    )
    for seed, weight in enumerate(model.trainable_weights):
        fill(weight, seed, 0.2)
    keras_lora.save_adapter(model, tmp_path / "adapter", names="bert")
    loaded = loaded_by_peft(module, tmp_path / "adapter")
    mask = np.ones_like(ids())
    expected = model(
        {"token_ids": ids(), "padding_mask": mask, "segment_ids": 0 * mask}
    )
    with torch.no_grad():
        logits = loaded(torch.tensor(ids()).long()).logits.numpy()
    np.testing.assert_allclose(to_numpy(expected), logits, rtol=0, atol=1e-5)


TASKS = {
    "gpt2": (transformers.GPT2LMHeadModel, keras_hub.models.GPT2CausalLM),
    "llama": (transformers.LlamaForCausalLM, keras_hub.models.Llama3CausalLM),
    "gemma": (transformers.GemmaForCausalLM, keras_hub.models.GemmaCausalLM),
}


@pytest.mark.parametrize("table", TASKS)
def test_language_models_have_a_prefix(table, tmp_path):
    _, backbone = pair(table, tmp_path / "base")
    torch_class, task = TASKS[table]
    module = torch_class.from_pretrained(tmp_path / "base").eval()
    model = task(backbone, preprocessor=None)
    keras_lora.apply_lora(model, rank=2, alpha=5, target=["query", "value"])
    for seed, weight in enumerate(model.trainable_weights):
        fill(weight, seed, 0.2)
    keras_lora.save_adapter(model, tmp_path / "adapter", names=table)
    loaded = loaded_by_peft(module, tmp_path / "adapter")
    inputs = {"token_ids": ids(), "padding_mask": np.ones_like(ids())}
    np.testing.assert_allclose(
        to_numpy(model(inputs)), theirs(loaded), rtol=0, atol=2e-5
    )


def fused(tmp_path, names, **kwargs):
    """Three Dense layers here that are one module there, saved."""
    inputs = keras.Input((6,))
    layers = [keras.layers.Dense(4, name=name) for name in names]
    model = keras.Model(inputs, keras.layers.add([x(inputs) for x in layers]))
    keras_lora.apply_lora(model, target=list(names), **{"rank": 2, **kwargs})
    for seed, layer in enumerate(layers):
        fill(layer.lora.b, seed, 0.3)
    keras_lora.save_adapter(model, tmp_path / "adapter", names=names)
    return model


def test_slices_of_other_ranks_and_scalings(tmp_path):
    names = {"q": "qkv[0/3]", "k": "qkv[1/3]", "v": "qkv[2/3]"}
    kwargs = {"rank_pattern": {"k": 3}, "alpha_pattern": {"v": 9.5}}
    model = fused(tmp_path, names, **kwargs)
    module = torch.nn.ModuleDict({"qkv": torch.nn.Linear(6, 12)})
    kernels = [to_numpy(model.get_layer(name).kernel) for name in names]
    module["qkv"].weight.data = torch.tensor(np.concatenate(kernels, 1).T.copy())
    module["qkv"].bias.data = torch.zeros(12)
    loaded = peft.PeftModel.from_pretrained(module, tmp_path / "adapter")
    x = np.random.default_rng(1).standard_normal((3, 6)).astype("float32")
    flat = loaded.base_model.model["qkv"](torch.tensor(x)).detach().numpy()
    expected = flat.reshape(3, 3, 4).sum(1)
    np.testing.assert_allclose(to_numpy(model(x)), expected, rtol=0, atol=1e-5)


def test_slices_that_do_not_fit_are_refused(tmp_path):
    names = {"q": "qkv[0/3]", "k": "qkv[1/3]", "v": "qkv[2/3]"}
    model = fused(tmp_path, names)
    adapter = keras_lora.Adapter.read(tmp_path / "adapter")
    weights = [to_numpy(weight) for weight in model.weights]

    def refused(match, **changes):
        broken = keras_lora.Adapter(
            **{
                "tensors": adapter.tensors,
                "config": adapter.config,
                "slices": adapter.slices,
            }
            | changes
        )
        with pytest.raises(ValueError, match=match):
            keras_lora.load_adapter(model, broken, names=names)
        for old, new in zip(weights, model.weights, strict=True):
            np.testing.assert_array_equal(old, to_numpy(new))

    full = {key: np.ones_like(value) for key, value in adapter.tensors.items()}
    refused("not zero outside", tensors=full)
    refused("slices of", slices={"qkv": [2, 2, 1]})
    refused("slices of", slices={"qkv": [2, 4]})
    refused(
        "Only in the model",
        slices={"qkv": [6, 0, 0]},
        tensors=dict(adapter.tensors)
        | {
            "qkv.lora_B.weight": adapter.tensors["qkv.lora_B.weight"]
            * np.repeat([1, 0, 0], 4)[:, None]
        },
    )
    refused(
        "do not divide|do not fit",
        tensors=dict(adapter.tensors)
        | {"qkv.lora_B.weight": adapter.tensors["qkv.lora_B.weight"][:-1]},
    )
    with pytest.raises(ValueError, match="not a slice of a module of 3"):
        keras_lora.save_adapter(model, tmp_path / "x", names={"q": "qkv[3/3]"})
    with pytest.raises(ValueError, match=r"can be one of .*'gemma'"):
        keras_lora.save_adapter(model, tmp_path / "x", names="mistral")
    assert not (tmp_path / "x").exists()
