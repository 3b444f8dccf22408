"""Two of the models of docs/compatibility.md, in the suite; the table has all."""

import re
from pathlib import Path

import backbones
import keras
import keras_hub
import numpy as np
import pytest
from compatibility import application
from compatibility import check
from layer_cases import fill

import keras_lora


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["MobileNetV2"])
def test_application(name):
    adapted, parameters, trained, difference, reload, reason = check(application(name))
    assert int(adapted) > 30
    assert trained == f"{adapted} of {adapted}"
    assert float(difference) < 1e-5
    assert (reload, reason) == ("exact", "")
    assert int(parameters.replace(",", "")) > 0


def readme_block(word):
    """The code block of README that holds a word."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    return next(block for block in blocks if word in block)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="README serves with TensorFlow"
)
def test_readme_takes_a_preset_to_a_merged_saved_model(tmp_path, monkeypatch):
    """The very code, with a small random preset in place of the one to download."""
    monkeypatch.chdir(tmp_path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=len(words),
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=32,
        max_sequence_length=12,
    )
    preset = keras_hub.models.BertTextClassifier(
        backbone=backbone,
        num_classes=2,
        preprocessor=keras_hub.models.BertTextClassifierPreprocessor(
            keras_hub.models.BertTokenizer(vocabulary=words), sequence_length=8
        ),
    )
    preset.save_to_preset("preset")
    texts, labels = ["good film", "bad film"] * 16, np.array([1, 0] * 16)
    names = {"keras": keras, "keras_lora": keras_lora, "texts": texts, "labels": labels}
    exec(readme_block("from_preset").replace("bert_base_en", "./preset"), names)

    classifier = names["classifier"]
    assert len(keras_lora.summary(classifier)) == 4
    expected = classifier.predict(texts, verbose=0)
    np.testing.assert_allclose(names["logits"], expected, rtol=0, atol=1e-5)
    loaded = keras.models.load_model("classifier.keras")
    assert isinstance(loaded, keras_hub.models.TextClassifier)
    np.testing.assert_array_equal(loaded.predict(texts, verbose=0), expected)
    fresh = keras_hub.models.TextClassifier.from_preset("./preset", num_classes=2)
    fresh.set_weights(preset.get_weights())
    keras_lora.load_adapter(fresh, "adapter", names="bert")
    np.testing.assert_array_equal(fresh.predict(texts, verbose=0), expected)
    keras_lora.merge_lora(classifier)
    assert type(classifier) is keras_hub.models.BertTextClassifier


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
