"""Saving and switching adapters, as ratios to the whole model's weights."""

import tempfile
import time
from pathlib import Path

import keras
from keras import ops

import keras_lora
from benchmarks import networks
from benchmarks.timing import Ratio, ratios


def switch(network, arguments, rounds):
    """Time to load, time to save, and bytes on disk."""
    work = getattr(networks, network)(*arguments)
    model = work.models["keras_lora"]()
    with tempfile.TemporaryDirectory() as folder:
        weights, adapter = Path(folder, "all.weights.h5"), Path(folder, "adapter")
        save = {
            "all weights": lambda: model.save_weights(weights),
            "adapter": lambda: keras_lora.save_adapter(model, adapter),
        }
        load = {
            "all weights": lambda: model.load_weights(weights),
            "adapter": lambda: keras_lora.load_adapter(model, adapter),
        }
        for run in (*save.values(), *load.values()):
            run()
        size = sum(path.stat().st_size for path in adapter.iterdir())
        share = size / weights.stat().st_size
        return {
            "saving": ratios(save, "all weights", rounds)["adapter"],
            "loading": ratios(load, "all weights", rounds)["adapter"],
            "bytes": Ratio(share, share, share, share),
        }


def adopting(network, arguments, rounds):
    """Seconds of apply_lora and its inverses for many layers, and of their floors.

    Those are making the variables, and assigning W + scaling * A @ B to the kernels.
    """
    (count,) = arguments

    class Many(keras.layers.Layer):
        def build(self, shape):
            self.parts = [keras.layers.Dense(8) for _ in range(count)]
            for part in self.parts:
                part.build(shape)

    model = Many()
    model.build((None, 8))

    def variables():
        uniform = keras.initializers.RandomUniform(-1, 1)
        for _ in range(count):
            keras.Variable(uniform, (8, 8))
            keras.Variable("zeros", (8, 8))
            keras.Variable(0.0)

    def apply():
        keras_lora.apply_lora(model, rank=8, target=keras.layers.Dense)

    def assign():
        for part in model.parts:
            a, b = part.lora.a, ops.multiply(part.lora.b, scaling)
            part.kernel.assign(ops.add(part.kernel, ops.matmul(a, b)))

    scaling = keras.Variable(1.0)
    times = {}
    for _ in range(rounds):
        for name, run in (
            ("variables", variables),
            ("apply_lora", apply),
            ("remove_lora", lambda: keras_lora.remove_lora(model)),
            ("apply_lora", apply),
            ("products, assigned", assign),
            ("merge_lora", lambda: keras_lora.merge_lora(model)),
        ):
            start = time.perf_counter()
            run()
            times.setdefault(name, []).append(time.perf_counter() - start)
    best = {name: min(taken) for name, taken in times.items()}
    best["apply_lora beyond"] = best["apply_lora"] - best["variables"]
    best["merge_lora beyond"] = best["merge_lora"] - best["products, assigned"]
    return {f"{name}, s": Ratio(*[value] * 4) for name, value in best.items()}
