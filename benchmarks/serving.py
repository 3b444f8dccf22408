"""Many adapters in one model: the cost of a call, and of what the bank replaces."""

import tempfile
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import keras_lora
from benchmarks.networks import normal
from benchmarks.timing import Ratio, ratios
from keras_lora.files.save import adapter_of

COUNTS = (8, 64, 256)


def transformer(width, length):
    inputs = keras.Input((length, width))
    heads = keras.layers.MultiHeadAttention(width // 64, 64, name="attention")
    hidden = keras.layers.LayerNormalization()(inputs + heads(inputs, inputs))
    up = keras.layers.Dense(4 * width, activation="gelu", name="up")(hidden)
    down = keras.layers.Dense(width, name="down")(up)
    hidden = keras.layers.LayerNormalization()(hidden + down)
    return keras.Model(inputs, keras.layers.Dense(width, name="head")(hidden))


def some_adapter(model, rank):
    report = keras_lora.apply_lora(model, rank=rank)
    for row in report:
        row.layer.lora.b.assign(normal(*row.layer.lora.b.shape) * 0.01)
    adapter = adapter_of(model)
    keras_lora.remove_lora(model)
    return adapter


def bank_of(count, width, length, rank):
    model = transformer(width, length)
    adapter = some_adapter(model, rank)
    names = [f"tenant {number}" for number in range(count)]
    return keras_lora.AdapterBank(model, dict.fromkeys(names, adapter))


def call(network, arguments, rounds):
    """A batch with an adapter for each row, over the plain model."""
    width, rows, length, rank, jit_compile = arguments
    x = tf.constant(normal(rows, length, width))

    def compiled(function, *values):
        run = tf.function(function, jit_compile=jit_compile)
        run(*values), run(*values)
        return lambda: run(*values).numpy()

    plain = [transformer(width, length) for _ in range(2)]
    calls = {
        name: compiled(lambda x, model=model: model(x, training=False), x)
        for name, model in zip(("plain model", "control"), plain, strict=True)
    }
    for count in COUNTS:
        bank = bank_of(count, width, length, rank)
        ids = np.random.default_rng(0).permutation(bank.ids(bank.names))
        ids = tf.constant(np.resize(ids, rows))
        calls[f"{count} adapters"] = compiled(
            lambda x, ids, bank=bank: bank({"inputs": x, "adapter": ids}), x, ids
        )
    bank.activate("tenant 7")
    calls["one for all rows"] = compiled(lambda x: bank.model(x, training=False), x)
    return ratios(calls, "plain model", rounds, inner=max(1, 256 // (rows * length)))


def seconds(run, rounds):
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return min(taken)


def size(path):
    files = [file for file in Path(path).rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files) / 1e6


def artifacts(network, arguments, rounds):
    """One artifact of N adapters, and N exported models: MB, and seconds to switch."""
    width, length, rank, count = arguments
    bank = bank_of(count, width, length, rank)
    adapter = some_adapter(transformer(width, length), rank)
    with tempfile.TemporaryDirectory() as folder:
        one, single = str(Path(folder, "bank")), str(Path(folder, "single"))
        bank.export(one)
        add = seconds(lambda: bank.add("tenant 0", adapter), rounds)
        served = tf.saved_model.load(one)
        swap, new = served.signatures["swap"], bank.swap_inputs("tenant 0", adapter)
        swap(**new)
        swapping = seconds(lambda: swap(**new), rounds)
        bank.release()
        bank.model.export(single, verbose=False)
        x, names = tf.zeros((1, length, width)), tf.constant(["tenant 0"])
        served.serve(x, names)

        def switch():
            other = tf.saved_model.load(single)
            return other.serve(x).numpy()

        found = {
            "bank, MB": size(one),
            f"{count} models, MB": count * size(single),
            "another model loaded and called, s": seconds(switch, rounds),
            "bank called with another name, s": seconds(
                lambda: served.serve(x, names).numpy(), rounds
            ),
            "add to the bank, s": add,
            "swap in the artifact, s": swapping,
        }
    return {name: Ratio(*[value] * 4) for name, value in found.items()}
