"""What Keras's own `layer.enable_lora` does beside this library, measured.

python -m benchmarks.compare_enable_lora
"""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from keras_lora import LoRADense

INPUTS, UNITS, RANK = 64, 64, 4


def data(rows=256):
    random = np.random.default_rng(0)
    x = random.standard_normal((rows, INPUTS), "float32")
    return x, np.tanh(x @ random.standard_normal((INPUTS, 8), "float32"))


def builtin(**kwargs):
    layer = keras.layers.Dense(UNITS, name="adapted", **kwargs)
    model = keras.Sequential([keras.Input((INPUTS,)), layer, keras.layers.Dense(8)])
    layer.enable_lora(RANK)
    return model


def ours(**kwargs):
    layer = LoRADense(UNITS, rank=RANK, name="adapted", **kwargs)
    return keras.Sequential([keras.Input((INPUTS,)), layer, keras.layers.Dense(8)])


def train(model, epochs):
    model.layers[-1].trainable = False
    model.compile(keras.optimizers.SGD(0.5), "mse", jit_compile=False)
    return model.fit(*data(), epochs=epochs, verbose=0).history["loss"]


def after_a_reload(make):
    """Loss before and after 20 more epochs on a model that was saved and loaded."""
    keras.utils.set_random_seed(1)
    model = make()
    train(model, 2)
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder, "model.keras"))
        losses = train(keras.models.load_model(Path(folder, "model.keras")), 20)
    return f"{losses[0]:.4f} -> {losses[-1]:.4f}"


def trainable_after_toggling(make):
    model = make()
    model.trainable = False
    model.trainable = True
    path = [w.path for w in model.layers[0].trainable_weights]
    return "trains" if any(p.endswith("kernel") for p in path) else "stays frozen"


def alpha_of_the_constructor(make):
    if make is builtin:
        layer = keras.layers.Dense(UNITS, lora_rank=2, lora_alpha=16)
        layer.build((None, INPUTS))
        return layer.lora_alpha
    return LoRADense(UNITS, rank=2, alpha=16).lora.alpha


def kernel_sized_gradients(make):
    """Arrays of the kernel's size that one training step computes."""
    import tensorflow as tf

    layer = make().layers[0]
    trained = [v.value for v in layer.trainable_variables if "lora" in v.path]

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(x, training=True) ** 2)
        return tape.gradient(loss, trained)

    graph = step.get_concrete_function(tf.zeros((7, INPUTS))).graph
    reads = ("ReadVariableOp", "Identity", "StopGradient")
    size = INPUTS * UNITS
    needed, todo = {}, [tensor.op for tensor in graph.outputs]
    while todo:
        operation = todo.pop()
        if operation.name not in needed:
            needed[operation.name] = operation
            todo += [tensor.op for tensor in operation.inputs]
    return sum(
        operation.type not in reads
        and any(output.shape.num_elements() == size for output in operation.outputs)
        for operation in needed.values()
    )


ROWS = [
    ("loss of 20 epochs after a reload", after_a_reload),
    ("the kernel, once `trainable` was toggled", trainable_after_toggling),
    ("`alpha=16` given to the constructor becomes", alpha_of_the_constructor),
    ("kernel-sized arrays computed in a step", kernel_sized_gradients),
]


def table():
    lines = ["| | `layer.enable_lora` | keras_lora |", "|---|---|---|"]
    for title, measure in ROWS:
        lines.append(f"| {title} | {measure(builtin)} | {measure(ours)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
