"""Adapts a transformer that recognizes Python modules by their documentation.

The texts are the docstrings of Python's standard library. A small transformer with
`keras.layers.MultiHeadAttention` learns which of eight modules 24 words are from. It is
then adapted to eight other modules in three ways: training everything, LoRA by
`apply_lora`, and training the head alone.

It takes less than three minutes on two cores.

    python examples/adapt_text_model.py
"""

import importlib
import inspect
import math
import os
import re
import tempfile
import zlib
from pathlib import Path

import quiet

quiet.import_keras()  # without TensorFlow's log lines
os.environ.setdefault("MPLBACKEND", "Agg")  # a notebook has its own

import keras
import matplotlib.pyplot as plt
import numpy as np

import keras_lora

# %% The task
# Which module of the standard library are these 24 words from? The model is trained on
# some modules, and then adapted to others.

SEEN = ["argparse", "decimal", "email.message", "logging", "socket", "unittest.case"]
SEEN += ["datetime", "tarfile"]
UNSEEN = ["asyncio.events", "fractions", "http.client", "mailbox", "pathlib", "zipfile"]
UNSEEN += ["statistics", "tkinter"]
WORDS, LENGTH, WIDTH, RANK = 4096, 24, 64, 4


def docstrings(name):
    """Returns the words of a module's docstrings, and of its classes and functions."""
    try:
        module = importlib.import_module(name)
    except ImportError:  # tkinter is left out of some installations
        return docstrings("pydoc")
    found, todo = [], [module]
    for thing in todo:
        found.append(inspect.getdoc(thing) or "")
        if inspect.ismodule(thing) or inspect.isclass(thing):
            todo += [
                member
                for key, member in sorted(vars(thing).items())
                if (inspect.isclass(member) or inspect.isroutine(member))
                and getattr(member, "__module__", name) == name
                and member not in todo
            ]
    return re.findall(r"[a-z]+", " ".join(found).lower())


def pieces(modules):
    """Returns windows of LENGTH words as ids, and labels, to train and to test with."""
    random = np.random.default_rng(0)
    parts = {"train": ([], []), "test": ([], [])}
    for label, name in enumerate(modules):
        ids = np.array([zlib.crc32(word.encode()) % WORDS for word in docstrings(name)])
        halves = {"train": ids[: len(ids) * 2 // 3], "test": ids[len(ids) * 2 // 3 :]}
        for part, rows in (("train", 200), ("test", 60)):
            starts = random.integers(0, max(len(halves[part]) - LENGTH, 1), rows)
            for start in starts:
                window = halves[part][start : start + LENGTH]
                parts[part][0].append(np.pad(window, (0, LENGTH - len(window))))
                parts[part][1].append(label)
    return [
        (np.array(ids, "int32"), np.array(labels)) for ids, labels in parts.values()
    ]


# %% A small transformer


def transformer(classes):
    ids = keras.Input((LENGTH,), dtype="int32")
    x = keras.layers.Embedding(WORDS, WIDTH, name="words")(ids)
    for block in range(2):
        attention = keras.layers.MultiHeadAttention(
            4, WIDTH // 4, name=f"attention_of_block_{block}"
        )
        x = keras.layers.LayerNormalization()(x + attention(x, x))
        up = keras.layers.Dense(2 * WIDTH, activation="gelu", name=f"up_{block}")(x)
        down = keras.layers.Dense(WIDTH, name=f"down_{block}")(up)
        x = keras.layers.LayerNormalization()(x + down)
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(ids, keras.layers.Dense(classes, name="head")(x))


def train(model, title, data, epochs, learning_rate):
    bar = keras.utils.Progbar(
        epochs, width=24, unit_name="epoch", stateful_metrics=["accuracy", "loss"]
    )
    print(title)
    model.compile(
        keras.optimizers.Adam(learning_rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=False,
    )
    show = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: bar.update(epoch + 1, list(logs.items()))
    )
    model.fit(*data, epochs=epochs, batch_size=64, verbose=0, callbacks=[show])


def start_from(pretrained):
    """Returns a copy of the model with a new head, for other classes."""
    model = transformer(len(UNSEEN))
    for old, new in zip(pretrained.layers[:-1], model.layers[:-1], strict=True):
        new.set_weights(old.get_weights())
    return model


# %% Three ways to adapt it
# `apply_lora` adapts the projections inside attention, the dense layers and the
# embedding of an existing model; the new head trains with them.


def full(model):
    pass


def lora(model):
    keras_lora.apply_lora(
        model,
        rank=RANK,
        alpha=2 * RANK,
        target=r".*(query|key|value|attention_output|up_\d|down_\d|words)",
        also_train=["head"],
    )


def head_alone(model):
    for layer in model.layers[:-1]:
        layer.trainable = False


def draw(rows, path):
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, accuracy, parameters in rows:
        axes.scatter(parameters, 100 * accuracy, s=90, zorder=3)
        axes.annotate(
            f"{name}\n{100 * accuracy:.1f}%\n{parameters:,} parameters",
            (parameters, 100 * accuracy),
            xytext=(0, -12),
            textcoords="offset points",
            ha="center",
            va="top",
        )
    accuracies = [100 * accuracy for _, accuracy, _ in rows]
    spread = max(accuracies) - min(accuracies)
    axes.set(
        xscale="log",
        xlim=(100, 3e6),
        ylim=(min(accuracies) - 0.5 * spread, max(accuracies) + 0.15 * spread),
        xlabel="trained parameters",
        ylabel="accuracy on unseen text (%)",
        title=f"Which of {len(UNSEEN)} modules are these {LENGTH} words from?",
    )
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main(picture="adapt_text_model.png"):
    # %% Pretraining
    keras.utils.set_random_seed(0)
    seen, seen_test = pieces(SEEN)
    pretrained = transformer(len(SEEN))
    train(pretrained, f"Pretraining on {', '.join(SEEN)}", seen, 12, 1e-3)
    known = pretrained.evaluate(*seen_test, verbose=0)[1]
    print(f"accuracy on unseen text of these modules: {known:.1%}\n")

    # %% Training the three
    unseen, unseen_test = pieces(UNSEEN)
    rows = []
    ways = [
        ("Full fine-tuning", full, 1e-3),
        (f"LoRA, rank {RANK}", lora, 5e-3),
        ("Head alone", head_alone, 5e-3),
    ]
    for name, prepare, learning_rate in ways:
        model = start_from(pretrained)
        prepare(model)
        train(model, name, unseen, 12, learning_rate)
        accuracy = model.evaluate(*unseen_test, verbose=0)[1]
        trained = sum(math.prod(w.shape) for w in model.trainable_weights)
        rows.append((name, accuracy, trained))
        if prepare is lora:
            adapted = model

    # %% What each of them reaches
    print(f"\n{'':18}{'accuracy':>9}{'trained parameters':>20}")
    for name, accuracy, parameters in rows:
        print(f"{name:18}{accuracy:>9.1%}{parameters:>20,}")
    print()
    keras_lora.summary(adapted)
    predictions = adapted.predict(unseen_test[0], verbose=0)

    # %% Saved and loaded
    # The adapter is saved, and loaded into another copy of the pretrained model.

    with tempfile.TemporaryDirectory() as folder:
        keras_lora.save_adapter(adapted, Path(folder, "adapter"))
        size = sum(p.stat().st_size for p in Path(folder, "adapter").iterdir())
        another = start_from(pretrained)
        keras_lora.load_adapter(another, Path(folder, "adapter"))
    difference = np.abs(another.predict(unseen_test[0], verbose=0) - predictions).max()
    print(
        f"\nThe adapter's files take {size / 1024:.0f} KiB; loaded onto the pretrained "
        f"model they give the same predictions (difference {difference:.1e})."
    )

    # %% The picture
    draw(rows, picture)
    print(f"Picture: {picture}")


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    picture = Path(__file__).parents[1] / "docs" / "adapt_text_model.png"
    parser.add_argument("--picture", type=Path, default=picture)
    main(parser.parse_args().picture)
