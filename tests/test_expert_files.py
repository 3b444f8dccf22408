"""Adapters of experts in PEFT and here: stacks that PEFT adapts as parameters."""

import copy
import json
import re

import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import transformers
from families import FAMILIES
from families import HALF
from families import difference
from families import ours
from families import pair
from families import theirs

import keras_lora
from keras_lora.files.config import CONFIG
from keras_lora.files.folder import TENSORS
from keras_lora.models.adapt import lora_layers

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's of patterns it obeys

MIXTURE = {"enable_moe_block": True, "num_experts": 4, "moe_intermediate_size": 12}
KINDS = {
    "mixtral": "mlp.experts",
    "qwen2_moe": "mlp.experts",
    "qwen3_moe": "mlp.experts",
    "qwen3_5_moe": "mlp.experts",
    "gpt_oss": "mlp.experts",
    "gemma4_moe": "experts",
}
FAMILIES["gemma4_moe"] = FAMILIES["gemma4"]._replace(
    config=lambda: transformers.Gemma4TextConfig(
        **HALF,
        **MIXTURE,
        top_k_experts=2,
        global_head_dim=8,
        hidden_size_per_layer_input=0,
        layer_types=["full_attention"] * 2,
    )
)
BANK = ".*/(experts|moe_expert_bank)/.*"  # paths


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Name -> transformers' model and KerasHub's, with the same weights."""
    made = {}

    def pair_of(name):
        if name not in made:
            made[name] = pair(name, tmp_path_factory.mktemp(name) / "base")
        module, model = made[name]
        if lora_layers(model):
            keras_lora.remove_lora(model)
        return copy.deepcopy(module), model

    return pair_of


def saved_by_peft(module, folder, **settings):
    config = {"r": 2, "lora_alpha": 5, "target_modules": ["o_proj"], **settings}
    adapted = peft.get_peft_model(module, peft.LoraConfig(**config)).eval()
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    adapted.save_pretrained(folder)
    return adapted


def tensors_of(folder):
    return safetensors.numpy.load_file(folder / TENSORS)


def write(folder, tensors, **config):
    found = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(found | config))
    safetensors.numpy.save_file(tensors, folder / TENSORS, {"format": "pt"})


TARGETS = {
    "both": ("gate_up_proj", "{}.down_proj"),
    "first": ("{}.gate_up_proj",),
    "second": ("experts.down_proj",),
    "another_in_each": ("0.{}.down_proj", "1.{}.gate_up_proj"),
    "one_and_both": ("{}.down_proj", "layers.1.{}.gate_up_proj"),
}
FAST = [
    ("mixtral", "one_and_both"),
    ("mixtral", "first"),
    ("qwen2_moe", "one_and_both"),
    ("qwen3_moe", "another_in_each"),
    ("qwen3_5_moe", "both"),
    ("gpt_oss", "one_and_both"),
    ("gpt_oss", "another_in_each"),
    ("gemma4_moe", "one_and_both"),
]


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        pytest.param(
            *row, id="-".join(row), marks=() if row in FAST else pytest.mark.slow
        )
        for row in ((name, targets) for name in KINDS for targets in TARGETS)
    ],
)
def test_files_of_peft(name, targets, pairs, tmp_path):
    """They are read, give PEFT's outputs, and are written as they were."""
    module, model = pairs(name)
    before = ours(name, model)
    adapted = saved_by_peft(
        module,
        tmp_path / "theirs",
        target_parameters=[x.format(KINDS[name]) for x in TARGETS[targets]],
        rank_pattern={"experts.down_proj": 3},
        alpha_pattern={"experts.gate_up_proj": 7, "1.self_attn.o_proj": 2},
    )
    keras_lora.load_adapter(model, tmp_path / "theirs", names="transformers")
    expected = theirs(name, adapted)
    assert difference(expected, before) > 0.1
    assert difference(ours(name, model), expected) < 1e-5
    keras_lora.save_adapter(model, tmp_path / "ours", names="transformers")
    found, written = tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "ours")
    assert found.keys() == written.keys()
    for key, value in found.items():
        np.testing.assert_array_equal(written[key], value)


def adapted_here(model, target=BANK, **options):
    report = keras_lora.apply_lora(model, target=target, **options)
    for seed, weight in enumerate(model.trainable_weights):
        random = np.random.default_rng(seed)
        weight.assign(random.standard_normal(weight.shape) * 0.3)
    return report


@pytest.mark.parametrize("name", KINDS)
def test_peft_loads_ours(name, pairs, tmp_path):
    module, model = pairs(name)
    before = ours(name, model)
    in_halves = name in ("mixtral", "gemma4_moe")  # gate and up, one module there
    up = {".*/(expert_feedforward_intermediate_dense|up_proj)": 3} if in_halves else {}
    down = ".*/(expert_feedforward_output_dense|down_proj)"
    report = adapted_here(
        model,
        f"{BANK}|.*/query",
        rank=2,
        alpha=3,
        rank_pattern={down: 4, **up, ".*1/.*/query": 1},
        alpha_pattern={".*1/.*/query": 5},
        exclude=f".*1{down}|.*_bias",
    )
    banks = [row for row in report if re.fullmatch(BANK, row.path)]
    assert len(banks) == (5 if in_halves else 3)
    keras_lora.save_adapter(model, tmp_path, names="transformers")
    loaded = peft.PeftModel.from_pretrained(module, tmp_path).eval()
    expected = ours(name, model)
    assert difference(expected, before) > 0.1
    assert difference(theirs(name, loaded), expected) < 1e-5
    shapes = [(weight.name, weight.shape) for weight in model.trainable_weights]
    keras_lora.remove_lora(model)
    keras_lora.load_adapter(model, tmp_path, names="transformers")
    assert shapes == [(w.name, w.shape) for w in model.trainable_weights]
    assert difference(ours(name, model), expected) < 2e-6


def test_peft_adapts_nothing_but_the_experts(pairs, tmp_path):
    """For no `target_modules` PEFT would take some of its own choice."""
    module, model = pairs("mixtral")
    adapted_here(model, ".*/experts/.*gate_dense", rank=2)
    keras_lora.save_adapter(model, tmp_path, names="transformers")
    loaded = peft.PeftModel.from_pretrained(module, tmp_path)
    keys = [key for key, _ in loaded.named_parameters() if "lora_" in key]
    modules = {key.split(".lora_")[0] for key in keys}
    assert {name.split(".")[-2] for name in modules} == {"mlp"}
