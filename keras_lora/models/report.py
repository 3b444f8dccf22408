"""Reports on adapted models: a sequence of rows, and a table."""

import collections
import math
from typing import NamedTuple

import keras

from keras_lora.keras_internals import layer_state
from keras_lora.layers.adapter import LowRankAdapter
from keras_lora.models import sites, tables, training_state


class Row(NamedTuple):
    """One adapted weight; `parameters` counts A and B, `share` is theirs in its layer.

    A layer with one kernel has one row, under its own path.
    """

    path: str
    layer: object
    rank: int | None
    alpha: float | None
    scaling: float
    kind: str
    parameters: int
    share: float
    weight: str

    @property
    def adapter(self):
        return self.layer.loras[self.weight]


class Report(tables.Rows):
    """The adapted layers of a model as rows (.path .layer .rank .alpha).

    `print(report)` gives the table of `keras_lora.summary`.

    Attributes:
        skipped: Path -> why the layer was passed over.
        notes: Sentences below the table.
        errors: Path -> relative errors of the kernel, before and after a "loftq".
    """

    is_dry_run = False  # whether the model is without these adapters

    def __init__(self, paths, skipped=(), notes=(), errors=()):
        model, adapted = paths.model, paths.adapted
        self.model_name = model.name
        self.skipped = dict(skipped)
        self.notes = list(notes)
        self.errors = dict(errors)
        self.rows = [adapted_row(path, site) for path, site in adapted.items()]
        trained = {path: trained_parameters(x) for path, x in paths.with_model.items()}
        self.also_trained = [path for path, variables in trained.items() if variables]
        self.also_trained_parameters = sum(map(count, trained.values()))
        built = [site for site in adapted.values() if site.lora.built]
        self.adapted_parameters = sum(
            count(s.lora.weights) if s.lora.trains_rows else math.prod(s.kernel_shape)
            for s in built
        )
        # An int4 kernel is stored in half as many numbers.
        self.packed = sum(
            math.prod(site.kernel_shape) - count([site.frozen_kernel])
            for site in built
            if site.is_quantized
        )
        self.added = sum(count(row.adapter.weights) for row in self.rows)
        self.total = count(model.weights)
        self.trained = count(model.trainable_weights)

    @property
    def plain(self):
        """Parameters of the model without its adapters."""
        return self.total - self.added

    def __repr__(self):
        what = "dry run" if self.is_dry_run else "LoRA report"
        adapted = tables.plural(len(self), "adapted layer")
        return f"<{what} of {self.model_name}: {adapted}>"

    def parts(self):
        adapters = sum(row.parameters for row in self)
        head = ["layer", "kind", "rank", "alpha", "scaling", "parameters", "share"]
        rows = [
            [
                row.path,
                row.kind,
                "" if row.rank is None else str(row.rank),
                "" if row.alpha is None else f"{row.alpha:g}",
                f"{row.scaling:g}",
                f"{row.parameters:,}",
                percent(row.share),
            ]
            for row in self
        ]
        where = f" in {tables.join(self.also_trained)}" if self.also_trained else ""
        parameters = self.plain + self.packed
        reasons = collections.defaultdict(list)
        for path, why in self.skipped.items():
            reasons[why].append(path)
        lines = [
            f"{tables.plural(len(self), 'adapter')}: "
            f"{tables.plural(adapters, 'parameter')}",
            "Also trained: "
            f"{tables.plural(self.also_trained_parameters, 'parameter')}{where}",
            f"Trained: {self.trained:,} of {self.total:,} "
            f"({percent(self.trained / max(self.total, 1))})",
            "Optimizer memory (two moments, float32): "
            f"{tables.format_bytes(8 * self.trained)}, full fine-tuning "
            f"{tables.format_bytes(8 * self.plain)}",
            *(f"Skipped {tables.join(paths)}: {why}" for why, paths in reasons.items()),
            *self.notes,
            "Adapted: weights with "
            f"{percent(self.adapted_parameters / max(parameters, 1))} of the model's "
            f"{tables.plural(parameters, 'parameter')}",
        ]
        title = f"LoRA in {self.model_name}"
        if self.is_dry_run:
            title += " (dry run: nothing was changed)"
        return title, head, rows, lines


def summary(model: keras.layers.Layer) -> Report:
    """Prints a table of the adapted layers, and returns it as a sequence of rows.

    Each row has the layer's path and kind, rank, alpha, scaling, the parameters of
    A and B, and their share of the layer's parameters. The totals are below.

    Args:
        model: Any Keras model.

    Returns:
        A report like that of `apply_lora`.

    Examples:
        >>> report = keras_lora.summary(model)  # doctest: +ELLIPSIS
        LoRA in ...
        >>> [row.path for row in report]
        ['dense']
    """
    report = Report(sites.Paths(model))
    print(report)
    return report


def adapted_row(path, site):
    lora, layer = site.lora, site.lora_layer()
    parameters = count(layer_state.own_variables(lora))
    return Row(
        path,
        layer,
        lora.rank,
        lora.alpha,
        lora.scaling,
        type(layer).__name__,
        parameters,
        parameters / max(count(layer.weights), 1),
        site.weight_name,
    )


def trained_parameters(layer):
    """The parameters of a layer that train together with A and B, or did."""
    if isinstance(layer, LowRankAdapter):
        return []
    parameters = set(map(id, layer_state.own_variables(layer)))
    return [
        variable
        for variable in training_state.trained_variables(layer)
        if id(variable) in parameters
    ]


def count(weights):
    return sum(math.prod(weight.shape) for weight in weights)


def percent(share):
    return f"{100 * share:.2f}%"
