"""Two of the models of docs/compatibility.md, in the suite; the table has all."""

from pathlib import Path

import backbones
import keras
import keras_hub
import numpy as np
import pytest
from compatibility import application, check
from layer_cases import fill

import keras_lora


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["MobileNetV2"])
def test_application(name):
    adapted, parameters, trained, difference, reload, reason = check(application(name))
    assert int(adapted) > 30
    assert trained == f"{adapted} of {adapted}"
    assert float(difference) < 1e-5
    assert (reload, reason) == ("exact", "")
    assert int(parameters.replace(",", "")) > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_language_model_still_generates(tmp_path):
    """Adapted, reloaded and merged, a task generates the same tokens."""
    model = keras_hub.models.GPT2CausalLM(
        backbones.backbone("GPT2Backbone"), preprocessor=None
    )
    model.compile(sampler="greedy", jit_compile=False)
    prompt = {
        "token_ids": np.array([[3, 4, 5] + [0] * 9]),
        "padding_mask": np.array([[1, 1, 1] + [0] * 9]),
    }

    def generated(model):
        found = model.generate(prompt, stop_token_ids=None)["token_ids"]
        return keras.ops.convert_to_numpy(found).tolist()

    before = generated(model)
    report = keras_lora.apply_lora(model, rank=2, target=["query", "value"])
    assert generated(model) == before
    for seed, row in enumerate(report):
        fill(row.layer.lora.b, seed, 3.0)
    model.compile(sampler="greedy", jit_compile=False)
    tuned = generated(model)
    assert tuned != before
    model.save(tmp_path / "task.keras")
    loaded = keras.models.load_model(tmp_path / "task.keras")
    loaded.compile(sampler="greedy", jit_compile=False)
    assert generated(loaded) == tuned
    keras_lora.merge_lora(model)
    assert generated(model) == tuned


def test_every_backbone_is_in_the_table():
    table = (Path(__file__).parents[1] / "docs" / "compatibility.md").read_text()
    rows = {line.split("|")[1].strip() for line in table.splitlines() if "|" in line}
    assert set(backbones.names()) <= rows
