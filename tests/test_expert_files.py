"""Adapters of experts in PEFT and here: stacks that PEFT adapts as parameters."""

import copy
import itertools
import json
import re

import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
from families import FAMILIES, difference, ours, pair, theirs
from layer_cases import slow_but, to_numpy
from shared import assert_close

import keras_lora
from keras_lora.files.command import main
from keras_lora.files.config import CONFIG
from keras_lora.files.disk import TENSORS
from keras_lora.models.sites import adapted_sites

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's of patterns it obeys

KINDS = {
    "mixtral": "mlp.experts",
    "qwen2_moe": "mlp.experts",
    "qwen3_moe": "mlp.experts",
    "qwen3_5_moe": "mlp.experts",
    "gpt_oss": "mlp.experts",
    "gemma4_moe": "experts",
}
BANK = ".*/(experts|moe_expert_bank)/.*"  # paths


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Name -> transformers' model and KerasHub's, with the same weights."""
    made = {}

    def pair_of(name):
        if name not in made:
            made[name] = pair(name, tmp_path_factory.mktemp(name) / "base")
        module, model = made[name]
        if adapted_sites(model):
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
QUICK = (
    "mixtral-one_and_both",
    "mixtral-first",
    "qwen2_moe-one_and_both",
    "qwen3_moe-another_in_each",
    "qwen3_5_moe-both",
    "gpt_oss-one_and_both",
    "gemma4_moe-one_and_both",
)


@pytest.mark.parametrize(
    ("name", "targets"), slow_but(QUICK, itertools.product(KINDS, TARGETS))
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


@pytest.mark.parametrize("name", slow_but(KINDS.keys() - {"gpt_oss"}, KINDS))
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
    """Which an empty list says: null means modules of PEFT's own choice."""
    module, model = pairs("mixtral")
    adapted_here(model, ".*/experts/.*gate_dense", rank=2)
    keras_lora.save_adapter(model, tmp_path, names="transformers")
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == []
    loaded = peft.PeftModel.from_pretrained(module, tmp_path)
    keys = [key for key, _ in loaded.named_parameters() if "lora_" in key]
    modules = {key.split(".lora_")[0] for key in keys}
    assert {name.split(".")[-2] for name in modules} == {"mlp"}


OLD = {  # a pair for each expert: the module, gate, up, down
    "mixtral": ("block_sparse_moe.experts", "w1", "w3", "w2"),
    "qwen2_moe": ("mlp.experts", "gate_proj", "up_proj", "down_proj"),
    "qwen3_moe": ("mlp.experts", "gate_proj", "up_proj", "down_proj"),
}


def old_file(name, folder, rank=2, alpha=5, down_rank=3, left_out=()):
    """As before transformers 5; {(layer, expert, projection): A, B}, in float64."""
    module, model_sizes = OLD[name][0], FAMILIES[name].config()
    hidden = model_sizes.hidden_size
    inner = getattr(model_sizes, "moe_intermediate_size", model_sizes.intermediate_size)
    inner = 24 if name == "mixtral" else inner
    random, tensors, pairs = np.random.default_rng(3), {}, {}
    for layer, expert in np.ndindex(2, 4):
        for place, word in enumerate(OLD[name][1:]):
            if word in left_out:
                continue
            r = down_rank if place == 2 else rank
            sizes = (inner, hidden) if place == 2 else (hidden, inner)
            key = f"base_model.model.model.layers.{layer}.{module}.{expert}.{word}"
            a, b = (
                (random.standard_normal(shape) * 0.3).astype("float32")
                for shape in ((r, sizes[0]), (sizes[1], r))
            )
            tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
            pairs[layer, expert, place] = a.astype("float64"), b.astype("float64")
    folder.mkdir()
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha}
    config["rank_pattern"] = {OLD[name][3]: down_rank}
    config["target_modules"] = [word for word in OLD[name][1:] if word not in left_out]
    (folder / CONFIG).write_text(json.dumps(config))
    write(folder, tensors)
    return pairs


@pytest.mark.parametrize("name", OLD)
def test_a_pair_for_each_expert(name, pairs, tmp_path):
    """As files from before transformers 5 have them, which PEFT converts."""
    module, model = pairs(name)
    # PEFT reads no pattern for what Mixtral's modules were called.
    down_rank = 2 if name == "mixtral" else 3
    found = old_file(name, tmp_path / "old", down_rank=down_rank)
    report = keras_lora.load_adapter(model, tmp_path / "old", names="transformers")
    for row in report:
        delta = to_numpy(row.layer.loras[row.weight].delta())
        layer = int("transformer_layer_1" in row.path)
        for expert in range(4):
            updates = [
                alpha_over_rank * (b @ a).T
                for place, alpha_over_rank in (
                    (0, 5 / 2),
                    (1, 5 / 2),
                    (2, 5 / down_rank),
                )
                for a, b in [found[layer, expert, place]]
            ]
            if row.weight.endswith("output_dense"):
                expected = updates[2]
            elif row.weight.endswith("intermediate_dense"):
                expected = updates[1]
            else:
                whole = np.concatenate(updates[:2], axis=1)
                expected = updates[0] if name == "mixtral" else whole
            assert_close(delta[expert], expected, 1e-6)
    expected = ours(name, model)
    if name != "qwen2_moe":  # of which PEFT drops the experts
        loaded = peft.PeftModel.from_pretrained(module, tmp_path / "old").eval()
        assert difference(theirs(name, loaded), expected) < 1e-5
    keras_lora.save_adapter(model, tmp_path / "new", names="transformers")
    loaded = peft.PeftModel.from_pretrained(pairs(name)[0], tmp_path / "new").eval()
    assert difference(theirs(name, loaded), expected) < 1e-5


def test_half_of_what_is_fused(pairs, tmp_path):
    """Which PEFT does not convert."""
    module, model = pairs("mixtral")
    old_file("mixtral", tmp_path / "old", left_out=("w3",))
    report = keras_lora.load_adapter(model, tmp_path / "old", names="transformers")
    assert len(report) == 4
    with pytest.raises(ValueError, match="without also targeting w3"):
        peft.PeftModel.from_pretrained(module, tmp_path / "old")
    expected = ours("mixtral", model)
    keras_lora.save_adapter(model, tmp_path / "new", names="transformers")
    module = pairs("mixtral")[0]
    loaded = peft.PeftModel.from_pretrained(module, tmp_path / "new").eval()
    assert difference(theirs("mixtral", loaded), expected) < 1e-5


def fewer_experts(tensors):
    return {k: x[:, :6] if "lora_B" in k else x[:6] for k, x in tensors.items()}


def no_whole_experts(tensors):
    return {k: x[:, :7] if "lora_B" in k else x[:7] for k, x in tensors.items()}


def other_inputs(tensors):
    return {k: x[:, :9] if "lora_A" in k else x for k, x in tensors.items()}


def other_outputs(tensors):
    return {k: x[:9] if "lora_B" in k else x for k, x in tensors.items()}


def swapped(tensors):
    inner = {k: x for k, x in tensors.items() if "base_layer" in k}

    return {k.replace(".base_layer", ""): x for k, x in inner.items()} | {
        k.replace("experts.", "experts.base_layer."): x
        for k, x in tensors.items()
        if k not in inner
    }


def without_b(tensors):
    return {k: x for k, x in tensors.items() if "base_layer.lora_B" not in k}


def one_wrapped(tensors):
    return {k: x for k, x in tensors.items() if "base_layer" not in k}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (fewer_experts, r"factors of '.*experts\.\w+', with shapes \(2, 3, "),
        (no_whole_experts, r"'model\.layers\..\.mlp\.experts\.\w+'.* Received: \(7, "),
        (other_inputs, r"experts\.(gate_up|down)_proj"),
        (other_outputs, r"experts\.(gate_up|down)_proj"),
        (swapped, r"experts\.(gate_up|down)_proj"),
        (without_b, r"gate_up_proj' needs A and B"),
        (one_wrapped, r"factors for 1 parameters of 'model\.layers\.0\.mlp\.experts'"),
    ],
)
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_what_does_not_fit_is_named(name, change, reason, pairs, tmp_path):
    module, model = pairs(name)
    before = ours(name, model)
    saved_by_peft(
        module,
        tmp_path,
        target_modules=[],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    write(tmp_path, change(tensors_of(tmp_path)))
    with pytest.raises(ValueError, match=reason):
        keras_lora.load_adapter(model, tmp_path, names="transformers")
    assert adapted_sites(model) == []
    np.testing.assert_array_equal(ours(name, model), before)


def test_old_files_that_are_no_stacks(pairs, tmp_path):
    model = pairs("mixtral")[1]
    old_file("mixtral", tmp_path / "old")
    tensors = tensors_of(tmp_path / "old")
    key = "base_model.model.model.layers.0.block_sparse_moe.experts.2.w2"
    fewer = {k: x for k, x in tensors.items() if not k.startswith(key)}
    for found, config, reason in (
        (fewer, {}, r"experts\.down_proj' need .* of the experts \[0, 1, 3\]"),
        (tensors, {"alpha_pattern": {r"experts\.1\.w2": 3}}, "one for all"),
        (
            {**tensors, f"{key}.lora_magnitude_vector": np.ones(16, "float32")},
            {"use_dora": True},
            "only A and B are",
        ),
    ):
        write(tmp_path / "old", found, **config)
        with pytest.raises(ValueError, match=reason):
            keras_lora.load_adapter(model, tmp_path / "old", names="transformers")
        assert adapted_sites(model) == []


def test_what_peft_has_not_for_parameters(pairs, tmp_path):
    """No dropout, no DoRA; and no name for a bias of experts."""
    module, model = pairs("mixtral")
    adapted_here(model, f"{BANK}|.*/query", rank=2, dropout=0.1)
    with pytest.warns(UserWarning, match=r"lora_dropout=0\.0 instead of 0\.1"):
        keras_lora.save_adapter(model, tmp_path, names="transformers")
    loaded = peft.PeftModel.from_pretrained(module, tmp_path).eval()
    expected = ours("mixtral", model)
    assert difference(theirs("mixtral", loaded), expected) < 1e-5
    keras_lora.remove_lora(model)
    keras_lora.apply_lora(model, target=BANK, rank=2, use_dora=True)
    with pytest.raises(ValueError, match="use_dora, which PEFT does not support"):
        keras_lora.save_adapter(model, tmp_path, names="transformers")
    model = pairs("gpt_oss")[1]
    keras_lora.apply_lora(model, target=".*gate_up_proj_bias", rank=2)
    with pytest.raises(ValueError, match=r"gate_up_proj_bias.*no counterpart in"):
        keras_lora.save_adapter(model, tmp_path, names="transformers")
    with pytest.raises(ValueError, match=r"gate_dense'.*no counterpart in"):
        model = pairs("mixtral")[1]
        keras_lora.apply_lora(model, target=BANK, rank=2)
        keras_lora.save_adapter(model, tmp_path, names="transformers4")


def deltas_of(model):
    """Path -> scaling * A @ B of each expert, in float64."""
    found = {}
    for site in adapted_sites(model):
        lora = site.lora
        a, b = (to_numpy(x).astype("float64") for x in (lora.a, lora.b))
        if a.ndim == 3:
            found[site.frozen_kernel.path] = float(lora.scaling) * a @ b
    return found


def test_spectra_and_sums_of_experts(pairs, tmp_path, capsys):
    """Of a folder without its model, against the deltas in float64."""
    name, (module, model) = "qwen3_moe", pairs("qwen3_moe")
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    settings = {"target_modules": [], "target_parameters": parameters}
    saved_by_peft(module, tmp_path / "one", **settings)
    keras_lora.load_adapter(model, tmp_path / "one", names="transformers")
    one = deltas_of(model)
    rows = keras_lora.analyze(tmp_path / "one")
    assert [row.path.rpartition(".")[2] for row in rows] == [
        "down_proj",
        "gate_up_proj",
    ] * 2
    norms = sorted(float(np.linalg.norm(delta)) for delta in one.values())
    assert_close(sorted(row.norm for row in rows), norms, 1e-5)
    values = np.linalg.svd(next(iter(one.values())), compute_uv=False)[:, :2]
    expected = np.sort(values, axis=None)[::-1]
    row = min(rows, key=lambda row: abs(row.norm - np.linalg.norm(expected)))
    assert_close(row.singular_values, expected, 1e-5)
    assert main(["show", str(tmp_path / "one")]) == 0
    assert "(2, 4, 16) (16, 2, 4)" in capsys.readouterr().out
    assert main(["diff", str(tmp_path / "one"), str(tmp_path / "one")]) == 0
    # another rank, of which the sum has both
    keras_lora.remove_lora(model)
    adapted_here(model, rank=3, alpha=2)
    keras_lora.save_adapter(model, tmp_path / "two", names="transformers")
    assert main(["diff", str(tmp_path / "one"), str(tmp_path / "two")]) == 1
    two = deltas_of(model)
    both = keras_lora.combine_adapters([tmp_path / "one", tmp_path / "two"], [0.5, 2])
    both.save(tmp_path / "both")
    keras_lora.remove_lora(model)
    keras_lora.load_adapter(model, tmp_path / "both", names="transformers")
    for path, delta in deltas_of(model).items():
        assert_close(delta, 0.5 * one[path] + 2 * two[path], 1e-5)
    expected = ours(name, model)
    loaded = peft.PeftModel.from_pretrained(pairs(name)[0], tmp_path / "both").eval()
    assert difference(theirs(name, loaded), expected) < 1e-5
    # and the nearest of a lower rank, one for all experts
    pairs(name)
    cut = keras_lora.combine_adapters([tmp_path / "both"], rank=2)
    keras_lora.load_adapter(model, cut, names="transformers")
    for path, delta in deltas_of(model).items():
        whole = 0.5 * one[path] + 2 * two[path]
        left, values, right = np.linalg.svd(whole, full_matrices=False)
        nearest = (left[..., :2] * values[:, None, :2]) @ right[:, :2]
        assert_close(delta, nearest, 1e-5)
        error = np.linalg.norm(delta - whole) / np.linalg.norm(whole)
        assert min(abs(error - x) for x in cut.errors.values()) < 1e-5


def test_experts_are_extracted(tmp_path):
    name = "mixtral"
    (module, base), (_, model) = (pair(name, tmp_path / x) for x in ("base", "again"))
    adapted_here(model, rank=2)
    expected = ours(name, model)
    keras_lora.merge_lora(model)
    adapter = keras_lora.extract_adapter(base, model, rank=2, names="transformers")
    assert len(adapter.errors) == 6
    assert max(adapter.errors.values()) < 1e-5
    adapter.save(tmp_path)
    loaded = peft.PeftModel.from_pretrained(module, tmp_path).eval()
    assert difference(theirs(name, loaded), expected) < 2e-5


def test_a_bank_names_the_experts(pairs, tmp_path):
    model = pairs("mixtral")[1]
    adapted_here(model, rank=2)
    keras_lora.save_adapter(model, tmp_path, names="transformers")
    keras_lora.remove_lora(model)
    with pytest.raises(ValueError, match=r"bank cannot hold .*experts\.gate_up_proj"):
        keras_lora.AdapterBank(model, {"one": tmp_path}, names="transformers")
