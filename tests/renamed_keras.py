"""A copy of Keras in which a private name is another, as in a coming release.

    python tests/renamed_keras.py            every name of the table
    python tests/renamed_keras.py _called    this one

For each, a process of its own imports the copy, then keras_lora, and does what needs
the name. The sentence of `private_names` has to come, and nothing may have changed.
"""

import os
import pathlib
import re
import subprocess
import sys
import tempfile

import keras

from keras_lora.keras_internals import private_names

# What a user does, by what needs the name: (statements before, the call).
USES = {
    private_names.MODELS: ("", "keras_lora.apply_lora(model, rank=2)"),
    private_names.QUANTIZED: (
        "model.quantize('int8')",
        "keras_lora.apply_lora(model, rank=2, target=['a'])",
    ),
    private_names.LORA_PLUS: ("", "keras_lora.LoRAPlus('adam')"),
    private_names.LAYOUTS: (
        "mesh = keras.distribution.DeviceMesh((1,), ['model'], ['cpu:0']);"
        "layouts = keras.distribution.LayoutMap(mesh);"
        "layouts['.*kernel'] = (None, 'model');"
        "keras.distribution.set_distribution("
        "keras.distribution.ModelParallel(layout_map=layouts));"
        "model = network()",
        "keras_lora.apply_lora(model, rank=2)",
    ),
    private_names.BANKS: ("", "keras_lora.AdapterBank(model, target=['a'])"),
    private_names.MASKS: (
        "model = keras.Sequential([keras.Input((3,), dtype='int32'),"
        "keras.layers.ReversibleEmbedding(5, 4, name='a')])",
        "keras_lora.apply_lora(model, rank=2, target=['a'])",
    ),
    private_names.HUB: (
        "from keras_lora.keras_internals import keras_hub",
        "keras_hub.converters()",
    ),
}

PROGRAM = """
import keras
def network():
    layers = [keras.layers.Dense(4, name="a"), keras.layers.Dense(2, name="b")]
    return keras.Sequential([keras.Input((3,)), *layers])
model = network()
try:
    import keras_lora
    {before}
    types = [type(layer) for layer in model.layers]
    {call}
except (ImportError, ValueError) as error:
    assert "does not know how Keras" in str(error), error
    assert isinstance(error, ImportError) or types == [type(x) for x in model.layers]
    print(error)
"""


# Where Keras gives a layer its wrapped method, and a wrapper that does not tell of it.
GIVEN = "        obj.build = build_wrapper\n"
HIDDEN = """\
        build_wrapper.__signature__ = inspect.signature(original_build_method)
        del build_wrapper.__wrapped__
"""


def words(row):
    """The names in a row that a copy can call otherwise."""
    if "closure" in row.name:
        return ["__wrapped__"]
    found = re.findall(r"\b_[a-z_]+|(?<=[ :])[a-z_]+_[a-z_]+", row.name)
    return found or [row.name.rpartition(".")[2]]


def every_name():
    """Each word once: an optimizer and a layer have some in common."""
    table = reversed(private_names.TABLE)
    return list({word: row for row in table for word in words(row)}.items())[::-1]


def copy_with(word, folder):
    """Keras, with links to its files but those that have the word."""
    source = pathlib.Path(keras.__file__).parent
    for path in source.rglob("*.py"):
        target = pathlib.Path(folder, "keras", path.relative_to(source))
        target.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text()
        renamed = re.sub(rf"(?<![A-Za-z0-9]){word}\b", f"{word}_of_later", text)
        if word == "__wrapped__":
            renamed = text.replace(GIVEN, HIDDEN + GIVEN)
        if renamed == text:
            target.symlink_to(path)
        else:
            target.write_text(renamed)


def said(word, row) -> str:
    """What keras_lora says with a Keras in which the word is another."""
    before, call = USES.get(row.needed_by, ("", "keras_lora.apply_lora(model)"))
    program = PROGRAM.format(before=before.replace(";", "\n    "), call=call)
    with tempfile.TemporaryDirectory() as folder:
        copy_with(word, folder)
        here = str(pathlib.Path(__file__).parents[1])
        paths = [folder, here, os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "KERAS_BACKEND": "jax",  # imports in a third of the time
        }
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            capture_output=True,
            text=True,
        )
    return done.stdout.strip() or f"NOTHING WAS SAID. {done.stderr[-1500:]}"


if __name__ == "__main__":
    failed = 0
    for word, row in every_name():
        if len(sys.argv) == 1 or word in sys.argv[1:]:
            text = said(word, row)
            right = row.name in text and keras.__version__ in text
            failed += not right
            print(f"{'ok   ' if right else 'WRONG'} {word}: {text}\n", flush=True)
    sys.exit(bool(failed))
