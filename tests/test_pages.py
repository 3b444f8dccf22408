"""Every block of code on README and the pages runs as pasted, in order."""

import os
import re
import subprocess
import sys
from pathlib import Path

import keras
import keras_hub
import numpy as np
import pytest
from pretrained import small_classifier
from processes import SCRIPTS

import keras_lora

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md")),
]
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# A block for another backend says so in its first line, and runs in its own process.
SETTINGS = re.compile(r"# ((?:[A-Z_]+=\S+ ?)+)\n")

pytestmark = [
    pytest.mark.skipif(
        keras.backend.backend() != "tensorflow", reason="exports, once is enough"
    ),
    pytest.mark.filterwarnings("ignore"),
]


def blocks(page):
    return BLOCK.findall((ROOT / page).read_text())


def run_block(block, names):
    settings = SETTINGS.match(block)
    if settings:
        environment = dict(pair.split("=", 1) for pair in settings[1].split())
        process = subprocess.run(
            [sys.executable, "-c", block],
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stderr[-2000:]
    else:
        exec(block, names)


class Bytes(keras_hub.tokenizers.ByteTokenizer):
    """As tokenizers of language models, which know where a text starts and ends."""

    start_token_id, end_token_id, pad_token_id = 1, 2, 0


def small_generator():
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=256,
        num_layers=1,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=16,
        max_sequence_length=32,
    )
    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(Bytes())
    return keras_hub.models.GPT2CausalLM(backbone, preprocessor)


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "preset"
    small_classifier(["good", "bad", "fine", "poor"]).save_to_preset(str(path))
    return str(path)


@pytest.fixture
def folder(tmp_path, monkeypatch, preset):
    """An empty folder, and small random models in place of those to download."""
    monkeypatch.chdir(tmp_path)
    real = keras_hub.models.TextClassifier.from_preset

    def from_preset(name, **kwargs):
        return real(preset, **kwargs)

    monkeypatch.setattr(keras_hub.models.TextClassifier, "from_preset", from_preset)
    monkeypatch.setattr(
        keras_hub.models.CausalLM, "from_preset", lambda name: small_generator()
    )
    return tmp_path


# Of these one needs JAX, which CI installs, and the others train for long.
SLOW = ("README", "adapt", "devices", "kerashub", "look_into_adapters", "quantized")
SLOW += ("resume", "serving_many_adapters", "train_together")


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow if Path(page).stem in SLOW else ())
        for page in PAGES
        if blocks(page)
    ],
)
def test_page(page, folder):
    names = {"__name__": "__main__"}
    for block in blocks(page):
        # Other tests run these, in one process and in several.
        if not any(name in block for name in SCRIPTS.values()):
            run_block(block, names)
    if page == "README.md":
        check_readme(names)


def check_readme(names):
    """What the blocks say that they do."""
    losses = names["model"].history.history["loss"]
    assert losses[-1] < losses[0]
    assert len(names["errors"]) == 2
    texts = names["texts"]
    loaded = keras.models.load_model("classifier.keras")
    assert isinstance(loaded, keras_hub.models.TextClassifier)
    expected = loaded.predict(texts, verbose=0)
    np.testing.assert_allclose(names["logits"], expected, rtol=0, atol=1e-5)
    fresh = keras_hub.models.TextClassifier.from_preset("bert_base_en", num_classes=2)
    np.testing.assert_allclose(names["outputs"][[0, 3]], expected[[0, 3]], atol=1e-5)
    keras_lora.load_adapter(fresh, "for_peft", names="transformers")
    assert len(keras_lora.summary(fresh)) == 4
    assert type(names["classifier"]) is keras_hub.models.BertTextClassifier


def test_the_quick_start_is_short():
    lines = [line for line in blocks("README.md")[0].splitlines() if line.strip()]
    assert len(lines) <= 20
    assert all(len(line) <= 100 for line in lines)


def test_links_and_pictures_are_there():
    for page in PAGES:
        folder, text = (ROOT / page).parent, (ROOT / page).read_text()
        prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        for target in LINK.findall(prose):
            if "://" not in target:
                assert (folder / target).exists(), (page, target)


def test_the_architecture_names_each_module():
    text = (ROOT / "docs/architecture.md").read_text().partition("\nWords\n")[0]
    packages = re.findall(r"^\*\*(\w+)\*\*(.*?)(?=^\*\*|\Z)", text, re.M | re.S)
    named = {
        f"{package}/{module}.py"
        for package, modules in packages
        for module in re.findall(r"`(\w+)`", modules)
    }
    paths = (ROOT / "keras_lora").glob("*/*.py")
    modules = {f"{x.parent.name}/{x.name}" for x in paths if x.stem != "__init__"}
    assert named == modules


def test_the_reference_has_every_public_name():
    page = (ROOT / "docs" / "reference.md").read_text()
    assert sorted(re.findall(r"::: keras_lora\.(\w+)", page)) == sorted(
        keras_lora.__all__
    )
