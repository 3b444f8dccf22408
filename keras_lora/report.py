"""What is adapted, and what it costs: a sequence of rows, and a table."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from keras_lora.lora_layer import LoRALayer
from keras_lora.paths import layer_paths


class Row(NamedTuple):
    """One adapted layer."""

    path: str
    layer: object
    rank: int
    alpha: float

    @property
    def parameters(self) -> int:
        """The numbers in A and B."""
        return count(self.layer.lora.weights)


class Report(Sequence):
    """The adapted layers of a model as rows (.path .layer .rank .alpha).

    `print(report)` gives the table of `keras_lora.summary`.
    """

    def __init__(self, model):
        self.model_name = model.name
        self.rows = [
            Row(path, layer, layer.lora.rank, layer.lora.alpha)
            for path, layer in layer_paths(model).items()
            if isinstance(layer, LoRALayer) and layer.lora is not None
        ]
        self.total = count(model.weights)
        self.trained = count(model.trainable_weights)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    def __repr__(self):
        return f"<LoRA report of {self.model_name}: {len(self)} adapted layers>"

    def __str__(self):
        adapters = sum(row.parameters for row in self)
        lines = table(
            ["layer", "kind", "rank", "alpha", "scaling", "parameters", "share"],
            [
                [
                    row.path,
                    type(row.layer).__name__,
                    str(row.rank),
                    f"{row.alpha:g}",
                    f"{row.layer.lora.scaling:g}",
                    f"{row.parameters:,}",
                    percent(row.parameters, count(row.layer.weights)),
                ]
                for row in self
            ],
        )
        return "\n".join(
            [
                f"LoRA in {self.model_name}",
                *lines,
                f"{len(self)} adapters: {adapters:,} parameters",
                f"Also trained: {self.trained - adapters:,} parameters",
                f"Trained: {self.trained:,} of {self.total:,} "
                f"({percent(self.trained, self.total)})",
            ]
        )


def summary(model) -> Report:
    """Prints a table of the adapted layers, and returns it as a sequence of rows.

    Each row has the layer's path and kind, rank, alpha, scaling, the parameters of
    A and B, and their share of the layer's; below stand the totals.

    Args:
        model: Any Keras model.
    """
    report = Report(model)
    print(report)
    return report


def count(weights):
    return sum(math.prod(weight.shape) for weight in weights)


def percent(part, whole):
    return f"{100 * part / whole:.2f}%" if whole else "-"


def table(head, rows):
    """Lines of text, the first two columns to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = "  ".join("-" * width for width in widths)

    def line(cells):
        pairs = list(zip(cells, widths, strict=True))
        left = [cell.ljust(width) for cell, width in pairs[:2]]
        return "  ".join([*left, *(c.rjust(w) for c, w in pairs[2:])])

    return [line(head), rule, *map(line, rows), rule]
