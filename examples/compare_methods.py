"""Compares methods at several learning rates: is one better than LoRA?

The tasks are the digits and the text of the other examples. Every method trains with
every learning rate and three seeds. The picture shows accuracy on unseen data against
the learning rate: the mean, and the range over the seeds.

    python examples/compare_methods.py             half an hour on two cores
    python examples/compare_methods.py --quick     one rate and seed; writes no picture
"""

import argparse
from pathlib import Path

import adapt_text_model as text
import finetune_digits as digits
import keras
import matplotlib.pyplot as plt
import numpy as np

import keras_lora

# %% The methods
# Each at five learning rates, three times.

RATES = [3e-4, 1e-3, 3e-3, 1e-2, 3e-2]
SEEDS = [0, 1, 2]
RANK = 4
# Name -> arguments of apply_lora, the start, and the optimizer of a plain one.
METHODS = {
    "LoRA": ({}, None, None),
    "rsLoRA": ({"use_rslora": True}, None, None),
    "DoRA": ({"use_dora": True}, None, None),
    "PiSSA": ({}, "pissa", None),
    "OLoRA": ({}, "olora", None),
    "EVA": ({}, "eva", None),
    "LoRA+": ({}, None, lambda optimizer: keras_lora.LoRAPlus(optimizer, 16.0)),
}


# %% Two tasks


class Digits:
    """A network that knows 0-4 learns 5-9."""

    title, epochs = "Digits", 25
    target, head = ["hidden_0", "hidden_1"], "head"

    def __init__(self):
        keras.utils.set_random_seed(0)
        images, _, labels, _ = digits.digits(range(5))
        self.pretrained = self.network()
        compiled(self.pretrained, keras.optimizers.Adam(1e-3))
        self.pretrained.fit(images, labels, epochs=15, batch_size=64, verbose=0)
        images, unseen, labels, unseen_labels = digits.digits(range(5, 10))
        self.train, self.test = (images, labels), (unseen, unseen_labels)

    def network(self):
        hidden = [
            keras.layers.Dense(n, "relu", name=f"hidden_{index}")
            for index, n in enumerate(digits.HIDDEN)
        ]
        return keras.Sequential(
            [keras.Input((64,)), *hidden, keras.layers.Dense(5, name="head")]
        )

    def model(self):
        model = self.network()
        for old, new in zip(
            self.pretrained.layers[:-1], model.layers[:-1], strict=True
        ):
            new.set_weights(old.get_weights())
        return model


class Text:
    """A transformer that tells Python modules from their words learns others."""

    title, epochs = "Text", 12
    target = r".*(query|key|value|attention_output|up_\d|down_\d)"
    head = "head"

    def __init__(self):
        keras.utils.set_random_seed(0)
        self.pretrained = text.transformer(len(text.SEEN))
        seen, _ = text.pieces(text.SEEN)
        compiled(self.pretrained, keras.optimizers.Adam(1e-3))
        self.pretrained.fit(*seen, epochs=12, batch_size=64, verbose=0)
        self.train, self.test = text.pieces(text.UNSEEN)

    def model(self):
        return text.start_from(self.pretrained)


# %% Training


def compiled(model, optimizer):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"], jit_compile=False)


def accuracies(task, method, rates, seed):
    """On unseen data, for one learning rate after the other from the same start."""
    settings, start, plus = METHODS[method]
    keras.utils.set_random_seed(seed)
    model = task.model()
    keras_lora.apply_lora(
        model,
        rank=RANK,
        alpha=2 * RANK,
        target=task.target,
        also_train=[task.head],
        **settings,
    )
    if start is not None:
        data = task.train[0] if start == "eva" else None
        keras_lora.initialize_lora(model, start, data=data)
    optimizer = keras.optimizers.Adam(RATES[0])
    compiled(model, plus(optimizer) if plus else optimizer)
    model.optimizer.build(model.trainable_variables)
    variables = [*model.weights, *model.optimizer.variables]
    before = [keras.ops.convert_to_numpy(variable) for variable in variables]
    found = []
    for rate in rates:
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)
        model.optimizer.learning_rate = rate
        model.fit(*task.train, epochs=task.epochs, batch_size=64, verbose=0)
        found.append(model.evaluate(*task.test, verbose=0)[1])
    return found


def draw(results, path):
    """results: title -> method -> (seeds, rates)"""
    figure, every = plt.subplots(
        1, len(results), figsize=(11, 4.4), layout="constrained"
    )
    for axes, (title, methods) in zip(every, results.items(), strict=True):
        for name, found in methods.items():
            values = 100 * np.array(found)
            width = 3 if name == "LoRA" else 1.3
            (line,) = axes.plot(RATES, values.mean(0), "o-", label=name, lw=width, ms=3)
            axes.fill_between(
                RATES, values.min(0), values.max(0), alpha=0.1, color=line.get_color()
            )
        axes.set(xscale="log", xlabel="learning rate (Adam)", title=title)
        axes.grid(alpha=0.3)
    every[0].set_ylabel("accuracy on unseen data (%)")
    every[-1].legend(fontsize=8)
    figure.savefig(path, dpi=110)


# %% Run it


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--picture", type=Path, default="compare_methods.png")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_known_args()[0]  # a notebook's own are others
    rates, seeds = (RATES[2:3], SEEDS[:1]) if arguments.quick else (RATES, SEEDS)

    kinds = [Digits] if arguments.quick else [Digits, Text]
    bar = keras.utils.Progbar(
        len(kinds) * len(METHODS) * len(seeds), width=24, unit_name="model"
    )
    results = {}
    for task in (kind() for kind in kinds):
        results[task.title] = {}
        for method in METHODS:
            found = []
            for seed in seeds:
                found.append(accuracies(task, method, rates, seed))
                bar.add(1)
            results[task.title][method] = found

    print(f"\n{'task':8}{'method':10}{'best rate':>10}{'accuracy':>10}{'seeds':>16}")
    for title, methods in results.items():
        for name, found in methods.items():
            values = np.array(found)
            best = values.mean(0).argmax()
            own = values[:, best]
            spread = f"{own.min():.1%} - {own.max():.1%}"
            print(
                f"{title:8}{name:10}{rates[best]:>10.0e}{own.mean():>10.1%}{spread:>16}"
            )
    if not arguments.quick:
        draw(results, arguments.picture)
        print(f"Picture: {arguments.picture}")


if __name__ == "__main__":
    main()
