"""What vLLM would say to an adapter, by its documented rules."""

import json
import math

import keras
import numpy as np
import pytest
from layer_cases import fill
from pretrained import sequential

import keras_lora
from keras_lora.files.config import CONFIG


def saved(folder, **kwargs):
    model = sequential()
    keras_lora.apply_lora(model, **{"rank": 4, "alpha": 6, **kwargs})
    for seed, weight in enumerate(model.trainable_weights):
        fill(weight, seed, 0.2)
    keras_lora.save_adapter(model, folder)
    return folder


def scaling_there(folder):
    """As vLLM computes it: of the whole file, without patterns."""
    config = json.loads((folder / CONFIG).read_text())
    root = math.sqrt if config.get("use_rslora") else float
    return config["lora_alpha"] / root(config["r"])


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_plain_adapter_passes(use_rslora, tmp_path):
    folder = saved(tmp_path / "adapter", use_rslora=use_rslora)
    assert keras_lora.check_adapter(folder) == []
    assert keras_lora.check_adapter(keras_lora.Adapter.read(folder)) == []


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"also_train": ["head"]}, ["modules_to_save, here ['head']"]),
        ({"use_dora": True}, ["refuses use_dora"]),
        ({"bias": "lora_only"}, ["refuses trained biases, here bias='lora_only'"]),
        ({"bias": "all"}, ["refuses trained biases, here bias='all'"]),
        ({"rank": 17}, ["max_lora_rank=16, and 'dense' has 17"]),
        ({"alpha_pattern": {"first": 9}}, ["and alpha_pattern: it would scale ["]),
        ({"rank_pattern": {"first": 2}}, ["and alpha_pattern: it would scale ["]),
        (
            {"also_train": ["head"], "rank": 32, "use_dora": True},
            ["modules_to_save", "use_dora", "max_lora_rank"],
        ),
    ],
)
def test_what_would_be_refused(kwargs, words, tmp_path):
    found = keras_lora.check_adapter(saved(tmp_path / "adapter", **kwargs))
    assert len(found) == len(words)
    for sentence, word in zip(found, words, strict=True):
        assert word in sentence
        assert "vLLM 0.22" in sentence and "2026-11-25" in sentence


def test_the_same_ratio_of_rank_and_alpha_passes(tmp_path):
    patterns = {"rank_pattern": {"first": 2}, "alpha_pattern": {"first": 3}}
    folder = saved(tmp_path / "adapter", **patterns)
    assert keras_lora.check_adapter(folder) == []
    assert scaling_there(folder) == 6 / 4


def test_a_cut_adapter_passes(tmp_path):
    """What the sentence about the rank advises."""
    folder = saved(tmp_path / "adapter", rank=24, alpha=24)
    assert keras_lora.check_adapter(folder, max_lora_rank=32) == []
    assert len(keras_lora.check_adapter(folder)) == 1
    keras_lora.combine_adapters([folder], rank=16).save(tmp_path / "cut")
    assert keras_lora.check_adapter(tmp_path / "cut") == []


def test_rows_of_a_table(tmp_path):
    layers = [keras.layers.Embedding(7, 4, name="table"), keras.layers.Dense(3)]
    model = keras.Sequential([keras.Input((5,)), *layers, keras.layers.Dense(2)])
    keras_lora.apply_lora(model, rank=2, trainable_token_indices=[1, 3])
    keras_lora.save_adapter(model, tmp_path / "adapter")
    (found,) = keras_lora.check_adapter(tmp_path / "adapter")
    assert "refuses rows of tables, here ['table']" in found


def test_other_tensors_and_engines(tmp_path):
    adapter = keras_lora.Adapter.read(saved(tmp_path / "adapter"))
    more = {"norm.weight": np.ones(3, "float32")}
    adapter = keras_lora.Adapter(adapter.tensors | more, adapter.config)
    (sentence,) = keras_lora.check_adapter(adapter)
    assert "other than A and B: ['norm.weight']" in sentence
    with pytest.raises(ValueError, match="`engine` must be 'vllm'"):
        keras_lora.check_adapter(adapter, engine="another")
    with pytest.raises(ValueError, match="rank"):
        keras_lora.check_adapter(adapter, max_lora_rank=0)
