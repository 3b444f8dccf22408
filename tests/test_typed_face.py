"""What static tools see of the layers is what the layers take."""

import ast
import inspect

import keras
import pytest
import typed_face

import keras_lora

STUB = typed_face.FACE.with_suffix(".pyi").read_text()
CLASSES = {x.name: x.body[0].args for x in ast.parse(STUB).body if hasattr(x, "bases")}


@pytest.mark.skipif(
    keras.version() < STUB.split("Keras ")[1].split(" ")[0],
    reason="the layers of an earlier Keras take less",
)
def test_it_is_what_the_classes_give():
    assert typed_face.stub() == STUB, "run `python tests/typed_face.py`"


@pytest.mark.parametrize("name", CLASSES)
def test_what_it_shows_is_understood(name):
    """By the class, in any Keras, and the first arguments in the same order."""
    shown = CLASSES[name]
    found = inspect.signature(getattr(keras_lora, name)).parameters
    required = [p for p, x in found.items() if x.default is x.empty][:-1]
    positional = [argument.arg for argument in shown.args][1:]
    assert positional[: len(required)] == required and required
    by_keyword = {argument.arg for argument in shown.kwonlyargs}
    assert by_keyword == {p for p, x in found.items() if x.kind == x.KEYWORD_ONLY}


def test_it_has_every_public_layer():
    layers = {name for name in keras_lora.__all__ if name.startswith("LoRA")}
    assert set(CLASSES) == layers - {"LoRALayer", "LoRAPlus"}
