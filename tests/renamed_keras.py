"""Packages in which a private name is another, as in a coming release.

    KERAS_BACKEND=jax python tests/renamed_keras.py            every name of the table
    KERAS_BACKEND=jax python tests/renamed_keras.py _called    this one

For each, a process of its own imports Keras (or what else has the name) with other
source, then keras_lora, and does what needs the name. The sentence of `probes` has
to come, and nothing may have changed.
"""

import contextlib
import importlib
import importlib.machinery
import io
import multiprocessing
import os
import re
import sys
import traceback

from keras_lora.keras_internals import private_names, probes

# What a user does, by what needs the name: (statements before, the call).
USES = {
    private_names.MODELS: ("", "keras_lora.apply_lora(model, rank=2)"),
    private_names.QUANTIZED: (
        "model.quantize('int8')",
        "keras_lora.apply_lora(model, rank=2, target=['a'])",
    ),
    private_names.LORA_PLUS: ("", "keras_lora.LoRAPlus('adam')"),
    private_names.PROCESSES: (
        "from keras_lora.keras_internals import processes",
        "processes.exchange(None, 1)",
    ),
    private_names.REMAT: (
        "scope = keras.RematScope(mode='full');"
        "scope.__enter__();"
        "layer = keras_lora.LoRADense(4, dropout=0.5);"
        "scope.__exit__()",
        "layer(keras.ops.ones((2, 3)), training=True)",
    ),
    private_names.MASKS: (
        "model = keras.Sequential([keras.Input((3,), dtype='int32'),"
        "keras.layers.ReversibleEmbedding(5, 4, name='a')])",
        "keras_lora.apply_lora(model, rank=2, target=['a'])",
    ),
    private_names.HUB: (
        "from keras_lora.keras_internals import keras_hub",
        "keras_hub.converters()",
    ),
    private_names.DROPOUT: (
        "layer = keras_lora.LoRADense(4, rank=2, dropout=0.5);"
        "layer.build((None, 3));"
        "scope = keras.StatelessScope();"
        "scope.__enter__()",
        "layer(keras.ops.ones((2, 3)), training=True)",
    ),
    private_names.IN_FUNCTIONS: (
        "import tensorflow as tf;"
        "layer = keras_lora.LoRADense(4, rank=2, use_dora=True)",
        "tf.function(lambda x: layer(x), autograph=False)(tf.ones((2, 3)))",
    ),
}
# By the package that has a name; JAX imports in a third of the time.
BACKENDS = {"TensorFlow": "tensorflow", "torch": "torch"}

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
    assert "keras_lora does not know how" in str(error), error
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
    """The names in a row that can be called otherwise."""
    if "closure" in row.name:
        return ["__wrapped__"]
    if row.package == "KerasHub":
        return ["backbone_cls"]
    found = re.findall(r"\b_[a-z_]+|(?<=[ :])[a-z_]+_[a-z_]+", row.name)
    return found or [row.name.rpartition(".")[2]]


def every_name():
    """Each word once: an optimizer and a layer have some in common."""
    table = reversed(private_names.TABLE)
    found = {word: row for row in table for word in words(row)}
    del found["_trace"]  # JAX stays imported, and `set_current_trace` is in its row
    return list(found.items())[::-1]


def rename(word, package):
    """Whatever is imported of a package from now on has another name for a word."""
    plain = importlib.machinery.SourceFileLoader.get_code
    pattern = re.compile(rf"(?<![A-Za-z0-9]){word}\b")
    if word == "stateless_scope":
        pattern = re.compile(f'(?<="){word}(?=")')  # a module is called so too

    def get_code(self, fullname):
        if fullname.partition(".")[0] == package:
            text = self.get_source(fullname)
            renamed = pattern.sub(f"{word}_of_later", text)
            if word == "__wrapped__":
                renamed = text.replace(GIVEN, HIDDEN + GIVEN)
            if renamed != text:
                return compile(renamed, self.path, "exec", dont_inherit=True)
        return plain(self, fullname)

    importlib.machinery.SourceFileLoader.get_code = get_code


ROWS = dict(every_name())


def said(word) -> str:
    """What keras_lora says, in this process, where the word is another."""
    row = ROWS[word]
    before, call = USES.get(row.needed_by, ("", "keras_lora.apply_lora(model)"))
    program = PROGRAM.format(before=before.replace(";", "\n    "), call=call)
    rename(word, probes.MODULES[row.package])
    os.environ["KERAS_BACKEND"] = BACKENDS.get(row.package, "jax")
    with contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            exec(program, {})
        except Exception:
            return f"{output.getvalue()}{traceback.format_exc()[-1500:]}"
    return output.getvalue().strip() or "NOTHING WAS SAID."


def forget(*packages):
    for name in list(sys.modules):
        if name.partition(".")[0] in packages:
            del sys.modules[name]


if __name__ == "__main__":
    wanted, failed = sys.argv[1:] or list(ROWS), 0
    # The processes find imported what Keras imports, but Keras itself.
    forget("keras", "keras_lora")
    for name in ("jax._src.distributed", "jax.extend.core"):
        sys.modules.pop(name, None)
    with multiprocessing.get_context("fork").Pool(maxtasksperchild=1) as pool:
        for word, text in zip(wanted, pool.imap(said, wanted), strict=True):
            row = ROWS[word]
            right = row.name in text and "Traceback" not in text
            failed += not right
            print(f"{'ok   ' if right else 'WRONG'} {word}: {text}\n", flush=True)
    sys.exit(bool(failed))
