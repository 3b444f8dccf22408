"""Adapts a network that knows the handwritten digits 0-4 to the digits 5-9.

Three ways side by side: training everything, LoRA, and the last layer alone. The
adapted network is then exported as a merged SavedModel and served by plain
TensorFlow in a process of its own.

It takes about 15 seconds on two cores.

    python examples/finetune_digits.py
"""

import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import quiet

quiet.import_keras()  # without TensorFlow's log lines
os.environ.setdefault("MPLBACKEND", "Agg")  # a notebook has its own

import keras
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_lora
from keras_lora import LoRADense

# %% The task
# The network knows the digits 0-4, and learns 5-9 from some 600 small images.

HIDDEN = (512, 64)
RANK = 4

SERVE = """
import sys
sys.modules["keras"] = sys.modules["keras_lora"] = None  # neither can be imported
import numpy as np
import tensorflow as tf
artifact = tf.saved_model.load(sys.argv[1])
images = np.load(sys.argv[2])
np.save(sys.argv[3], artifact.serve(images).numpy())
"""


def digits(classes):
    """Images (rows, 64) in [0, 1] and labels 0-4 of five classes, split in two."""
    images, labels = load_digits(return_X_y=True)
    chosen = np.isin(labels, classes)
    return train_test_split(
        (images[chosen] / 16).astype("float32"),
        labels[chosen] - min(classes),
        test_size=0.3,
        random_state=0,
    )


# %% The network
# `LoRADense` takes the arguments of `Dense`, and a rank. Its kernel is frozen.


def network(lora=False, trainable=True):
    """Two hidden layers and a head of five classes."""
    make = LoRADense if lora else keras.layers.Dense
    options = {"rank": RANK, "alpha": 2 * RANK} if lora else {}
    hidden = [make(n, activation="relu", **options) for n in HIDDEN]
    for layer in hidden:
        layer.trainable = trainable
    return keras.Sequential([keras.Input((64,)), *hidden, keras.layers.Dense(5)])


def train(model, title, data, epochs, learning_rate):
    bar = keras.utils.Progbar(
        epochs, width=24, unit_name="epoch", stateful_metrics=["accuracy", "loss"]
    )
    print(title)

    def show(epoch, logs):
        bar.update(epoch + 1, list(logs.items()))

    model.compile(
        keras.optimizers.Adam(learning_rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=False,
    )
    show_progress = keras.callbacks.LambdaCallback(on_epoch_end=show)
    model.fit(*data, epochs=epochs, batch_size=64, verbose=0, callbacks=[show_progress])
    return model


def start_from(pretrained, model):
    """Copies the hidden layers' kernels and biases; the head starts anew."""
    for old, new in zip(pretrained.layers[:-1], model.layers[:-1], strict=True):
        new.set_weights(old.get_weights())
    return model


# %% What it costs, and how it is served


def trained_parameters(model):
    return sum(math.prod(weight.shape) for weight in model.trainable_weights)


def bytes_on_disk(model):
    """The size of files that hold what was trained, and nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        if any(isinstance(layer, LoRADense) for layer in model.layers):
            keras_lora.save_adapter(model, folder)
        else:
            weights = model.trainable_weights
            values = [keras.ops.convert_to_numpy(w.value) for w in weights]
            np.savez(Path(folder, "trained.npz"), *values)
        return sum(path.stat().st_size for path in Path(folder).iterdir())


def serve_elsewhere(model, images):
    """Exports the model, and predicts with plain TensorFlow in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, name) for name in ("served", "images.npy", "outputs.npy")]
        keras_lora.export(model, paths[0])
        np.save(paths[1], images)
        command = [sys.executable, "-c", SERVE, *map(str, paths)]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return np.load(paths[2])


def draw(rows, images, labels, predicted, path):
    """Accuracy against trained parameters; some digits as the LoRA network reads."""
    figure = plt.figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.1, 1])
    axes = left.subplots()
    for name, accuracy, parameters, _ in rows:
        axes.scatter(parameters, 100 * accuracy, s=90, zorder=3)
        axes.annotate(
            f"{name}\n{100 * accuracy:.1f}%\n{parameters:,} parameters",
            (parameters, 100 * accuracy),
            xytext=(0, -14),
            textcoords="offset points",
            ha="center",
            va="top",
        )
    accuracies = [100 * row[1] for row in rows]
    spread = max(accuracies) - min(accuracies)
    axes.set(
        xscale="log",
        xlim=(80, 6e5),
        ylim=(min(accuracies) - 0.4 * spread, max(accuracies) + 0.12 * spread),
        xlabel="trained parameters",
        ylabel="accuracy on unseen images of 5-9 (%)",
        title="Digits 5-9, after pretraining on 0-4",
    )
    axes.grid(alpha=0.3)
    wrong = np.flatnonzero(labels != predicted)[:6]
    right_ones = np.flatnonzero(labels == predicted)[: 24 - len(wrong)]
    cells = right.subplots(4, 6).flat
    for cell, index in zip(cells, [*right_ones, *wrong], strict=True):
        cell.imshow(images[index].reshape(8, 8), cmap="gray_r")
        correct = labels[index] == predicted[index]
        text = f"{predicted[index] + 5}"
        cell.set_title(
            text if correct else f"{text}, is {labels[index] + 5}",
            color="black" if correct else "crimson",
            fontsize=10,
        )
        cell.set_axis_off()
    right.suptitle("What the LoRA network reads (in red: its errors)", fontsize=12)
    figure.savefig(path, dpi=110)


def main(picture="finetune_digits.png"):
    # %% Pretraining
    keras.utils.set_random_seed(0)
    images, unseen, labels, unseen_labels = digits(range(5))
    pretrained = train(
        network(), "Pretraining on the digits 0-4", (images, labels), 15, 1e-3
    )
    known = pretrained.evaluate(unseen, unseen_labels, verbose=0)[1]
    print(f"accuracy on unseen images of 0-4: {known:.1%}\n")

    # %% Three ways to learn the digits 5-9
    # All weights, the factors A and B beside frozen kernels, or the last layer alone.

    images, unseen, labels, unseen_labels = digits(range(5, 10))
    ways = [
        ("Full fine-tuning", network(), 1e-3),
        (f"LoRA, rank {RANK}", network(lora=True), 5e-3),
        ("Head alone", network(trainable=False), 5e-3),
    ]
    rows = []
    for name, model, learning_rate in ways:
        start_from(pretrained, model)
        train(model, name, (images, labels), 25, learning_rate)
        accuracy = model.evaluate(unseen, unseen_labels, verbose=0)[1]
        parameters, size = trained_parameters(model), bytes_on_disk(model)
        rows.append((name, accuracy, parameters, size))

    # %% What each of them reaches
    print(f"\n{'':18}{'accuracy':>9}{'trained parameters':>20}{'on disk':>12}")
    for name, accuracy, parameters, size in rows:
        print(f"{name:18}{accuracy:>9.1%}{parameters:>20,}{size / 1024:>8.0f} KiB")
    print()

    adapted = ways[1][1]
    keras_lora.summary(adapted)
    outputs = adapted.predict(unseen, verbose=0)

    # %% Merged, exported and served
    # Where the artifact is served, neither Keras nor keras_lora can be imported.

    served = serve_elsewhere(adapted, unseen)
    difference = np.abs(served - outputs).max()
    found = f"differs by at most {difference:.1e}" if difference else "is identical"
    print(
        "\nThe merged SavedModel, served without Keras and keras_lora, "
        f"{found} in {outputs.size:,} outputs."
    )
    if difference > 1e-5 * np.abs(outputs).max():
        sys.exit("The served predictions are not those of the model.")

    # %% The picture
    draw(rows, unseen, unseen_labels, outputs.argmax(-1), picture)
    print(f"Picture: {picture}")


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    picture = Path(__file__).parents[1] / "docs" / "finetune_digits.png"
    parser.add_argument("--picture", type=Path, default=picture)
    picture = parser.parse_args().picture
    picture.parent.mkdir(parents=True, exist_ok=True)
    main(picture)
