"""Adapts a recurrent network, trained on English, to Python's source code.

A GRU learns to predict the next character of Python's documentation. It is then adapted
to Python's source code in three ways: training everything, LoRA on the GRU's kernels,
and training the last layer alone. Both texts come with Python.

It takes about a minute on two cores.

    python examples/adapt_recurrent_model.py
"""

import argparse
import math
import os
import textwrap
from pathlib import Path

import quiet

quiet.import_keras()  # without TensorFlow's log lines
os.environ.setdefault("MPLBACKEND", "Agg")  # a notebook has its own

from pydoc_data.topics import topics

import keras
import matplotlib.pyplot as plt
import numpy as np

import keras_lora

# %% The texts
# Characters become numbers below 97: the printable ones, the line break, and one number
# for all others.

CHARACTERS = 97
STEPS = 40


def codes(text):
    """Characters as numbers below `CHARACTERS`."""
    found = np.frombuffer(text.encode("ascii", "replace"), "uint8").astype("int32")
    return np.where(found == 10, 95, np.clip(found - 32, 0, 96))


def windows(text, count, seed):
    """`count` pieces of a text, and the same pieces one character later."""
    found = codes(text)
    starts = np.random.default_rng(seed).integers(0, len(found) - STEPS - 1, count)
    pieces = np.stack([found[start : start + STEPS + 1] for start in starts])
    return pieces[:, :-1], pieces[:, 1:]


def source(names):
    """The source code of modules that come with Python."""
    folder = Path(textwrap.__file__).parent
    return "\n".join(Path(folder, f"{name}.py").read_text() for name in names)


ENGLISH = "\n".join(topics[name] for name in sorted(topics))
CODE = source(["argparse", "ast", "calendar", "configparser", "csv", "difflib", "enum"])
UNSEEN = source(["shutil", "statistics", "tarfile"])

# %% The network


def network():
    """Reads characters, and predicts the next one at each step."""
    return keras.Sequential(
        [
            keras.Input((STEPS,), dtype="int32"),
            keras.layers.Embedding(CHARACTERS, 48, name="characters"),
            keras.layers.GRU(192, return_sequences=True, name="memory"),
            keras.layers.Dense(CHARACTERS, name="next"),
        ]
    )


def train(model, text, rows, learning_rate, title):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(learning_rate), loss, jit_compile=False)
    history = model.fit(*windows(text, rows, seed=1), batch_size=64, verbose=0)
    print(f"{title}: {history.history['loss'][-1] / math.log(2):.2f} bits in training")
    return model


def bits(model, text):
    """Cross-entropy on a text, in bits per character."""
    pieces, following = windows(text, 512, seed=2)
    logits = model.predict(pieces, batch_size=256, verbose=0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return float(loss(following, logits)) / math.log(2)


# %% Three ways
# A target that names the GRU adapts both of its kernels: `memory/kernel` and
# `memory/recurrent_kernel`. `apply_lora` also finds cells inside RNN, Bidirectional and
# TimeDistributed.


def full(model):
    """Everything trains."""
    return model


def lora(model):
    report = keras_lora.apply_lora(
        model, rank=8, alpha=16, target=["memory"], also_train=["next"]
    )
    print(report)
    return model


def head(model):
    for layer in model.layers[:-1]:
        layer.trainable = False
    return model


WAYS = {
    "full fine-tuning": (full, 2e-3),
    "LoRA": (lora, 1e-2),
    "head alone": (head, 1e-2),
}


def draw(rows, before, path):
    """Draws bits per character of unseen code against trained parameters."""
    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for name, found, parameters in rows:
        axes.scatter(parameters, found, s=90, zorder=3)
        axes.annotate(
            f"{name}\n{found:.2f} bits",
            (parameters, found),
            xytext=(0, 10),
            textcoords="offset points",
            ha="center",
        )
    axes.axhline(before, color="gray", linestyle="--", linewidth=1)
    axes.annotate("before", (1.1e4, before), va="bottom", color="gray")
    low, high = min(row[1] for row in rows), before
    axes.set(
        xscale="log",
        xlim=(1e4, 4e5),
        ylim=(low - 0.1 * (high - low), high + 0.2 * (high - low)),
        xlabel="trained parameters",
        ylabel="bits per character of unseen code",
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--picture", default="adapt_recurrent_model.png")
    path = parser.parse_known_args()[0].picture
    keras.utils.set_random_seed(0)
    reader = train(network(), ENGLISH, 8000, 5e-3, "English")
    before = bits(reader, UNSEEN)
    rows = []
    for name, (prepare, learning_rate) in WAYS.items():
        model = network()
        model.set_weights(reader.get_weights())
        model = train(prepare(model), CODE, 4000, learning_rate, name)
        trained = sum(math.prod(w.shape) for w in model.trainable_weights)
        rows.append((name, bits(model, UNSEEN), trained))
    print(f"\n{'on unseen code':<20}{'bits':>6}{'trained parameters':>22}")
    print(f"{'before':<20}{before:>6.2f}{0:>22}")
    for name, found, trained in rows:
        print(f"{name:<20}{found:>6.2f}{trained:>22,}")
    draw(rows, before, path)


# %% Run it

if __name__ == "__main__":
    main()
