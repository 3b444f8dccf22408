"""The examples in the docstrings run and give what they say."""

import doctest
import importlib
import inspect
import os
import pkgutil
import re

import keras
import numpy as np
import pytest

import keras_lora


def examples():
    found = {}
    for module in pkgutil.walk_packages(keras_lora.__path__, "keras_lora."):
        tests = doctest.DocTestFinder().find(importlib.import_module(module.name))
        found |= {test.name: test for test in tests if test.examples}
    # A decorated function is of no module that doctest looks into.
    [test] = doctest.DocTestFinder().find(keras_lora.apply_lora, module=False)
    return found | {test.name: test}


EXAMPLES = examples()


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x, y = np.ones((4, 6), "float32"), np.ones((4, 2), "float32")
    model = keras.Sequential([keras.Input((6,)), keras_lora.LoRADense(2)])
    model.compile("sgd", "mse", jit_compile=False)
    names = vars(keras_lora) | {"keras": keras, "keras_lora": keras_lora}
    base = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(8), keras.layers.Dense(2)]
    )
    names |= {"x": x, "y": y, "model": model, "base": base, "np": np, "os": os}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    example = EXAMPLES[name]
    example.globs = names
    lines = []
    runner.run(example, out=lines.append)
    assert runner.failures == 0, "".join(lines)


def test_every_public_layer_has_an_example():
    layers = [name for name in keras_lora.__all__ if name.startswith("LoRA")]
    layers = set(layers) - {"LoRALayer", "LoRAPlus"}
    assert layers <= {name.rsplit(".", 1)[-1] for name in EXAMPLES}


@pytest.mark.parametrize("name", keras_lora.__all__)
def test_a_docstring_says_what_a_public_name_takes_and_gives(name):
    """Each argument that is not the Keras layer's, and what is returned."""
    value = getattr(keras_lora, name)
    text = inspect.getdoc(value)
    signature = inspect.signature(value)
    said = {
        word
        for words in re.findall(r"^ +\*{0,2}(\w+(?:, \w+)*): ", text, re.MULTILINE)
        for word in words.split(", ")
    }
    taken = set(signature.parameters) - {"self", "args", "kwargs"}
    if plain := getattr(value, "plain_class", None):
        taken -= set(inspect.signature(plain.__init__).parameters)
    if name != "LoRALayer":  # its kinds say them
        assert taken <= said
    if (
        not inspect.isclass(value)
        and signature.return_annotation is not signature.empty
    ):
        assert "\nReturns:\n" in text
