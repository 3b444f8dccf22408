"""Models of every construction, with LoRA layers in them."""

import keras
import numpy as np
from layer_cases import fill

from keras_lora import LoRADense
from keras_lora.models.sites import adapted_sites


def sequential():
    return keras.Sequential(
        [
            keras.Input((6,)),
            LoRADense(8, activation="relu", rank=2, alpha=6),
            keras.layers.BatchNormalization(),
            LoRADense(4, rank=0),
            LoRADense(3, use_bias=False, rank=3, name="last"),
        ]
    )


def functional():
    inputs = keras.Input((6,))
    shared = LoRADense(6, rank=2, activation="tanh", name="shared")
    x = shared(shared(inputs))
    return keras.Model(inputs, LoRADense(3, rank=2)(keras.layers.add([x, inputs])))


def nested():
    inputs = keras.Input((6,))
    inner = keras.Sequential([keras.Input((6,)), LoRADense(5, rank=2)], name="inner")
    return keras.Model(inputs, LoRADense(3, rank=1, alpha=2)(inner(inputs)))


@keras.saving.register_keras_serializable(package="tests")
class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.blocks = [LoRADense(6, rank=2) for _ in range(2)]
        self.heads = {"out": LoRADense(3, rank=2)}

    def call(self, inputs):
        for block in self.blocks:
            inputs = inputs + block(inputs)
        return self.heads["out"](inputs)


def subclassed():
    model = Subclassed()
    model(x())
    return model


MODELS = [sequential, functional, nested, subclassed]


def trained(build):
    """A compiled model whose adapters, biases and optimizer have moved."""
    model = build()
    for seed, layer in enumerate(adapted_sites(model)):
        fill(layer.lora.a, seed, 0.3)
        fill(layer.lora.b, seed + 50, 0.3)
    model.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=False)
    # Tracing takes seconds on TensorFlow, and is another's matter.
    model.run_eagerly = keras.backend.backend() == "tensorflow"
    for rows in (slice(8), slice(8, 16)):
        model.train_on_batch(x()[rows], y()[rows])
    model.run_eagerly, model.train_function = False, None
    return model


def x(rows=16):
    return np.random.default_rng(1).standard_normal((rows, 6), "float32")


def y(rows=16):
    return np.random.default_rng(2).standard_normal((rows, 3), "float32")
