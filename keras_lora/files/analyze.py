"""What an adapter has learned where: the spectrum of each update."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from typing import NamedTuple

import numpy as np

from keras_lora.files.factors import assert_finite
from keras_lora.files.factors import factors_of
from keras_lora.files.factors import slots_of
from keras_lora.files.folder import Adapter
from keras_lora.files.plot import draw
from keras_lora.files.spectrum import effective_rank
from keras_lora.files.spectrum import singular_values
from keras_lora.layers.method_files import method_in
from keras_lora.models.tables import Table
from keras_lora.models.tables import in_order

if TYPE_CHECKING:
    import keras


class Update(NamedTuple):
    """One layer's update, scaling * A @ B, as a matrix (inputs, outputs).

    norm is Frobenius's; relative_norm is that over the norm of W, None for an adapter
    apart from its model.
    """

    path: str
    rank: int
    norm: float
    relative_norm: float | None
    singular_values: np.ndarray

    def effective_rank(self, energy: float = 0.99) -> int:
        """How many singular values hold this share of the sum of their squares."""
        return effective_rank(self.singular_values, energy)


class Analysis(Table, Sequence):
    """Rows (.path .rank .norm .relative_norm .singular_values), which print as a table.

    Attributes:
        notes: What has to be said beside the table.
    """

    def __init__(self, name, rows, notes=()):
        self.name, self.rows, self.notes = name, list(rows), list(notes)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    def __repr__(self):
        return f"<Analysis of {self.name}: {len(self)} rows>"

    def parts(self):
        head = ["layer", "rank", "|update|", "over |W|", "largest", "90%", "99%"]
        rows = [
            [
                row.path,
                str(row.rank),
                f"{row.norm:.4g}",
                "" if row.relative_norm is None else f"{row.relative_norm:.4g}",
                f"{max(row.singular_values, default=0):.4g}",
                str(row.effective_rank(0.9)),
                str(row.effective_rank(0.99)),
            ]
            for row in self
        ]
        line = "90%, 99%: how many singular values hold that share of their squares."
        return f"Updates of {self.name}", head, rows, [line, *self.notes]

    def plot(self, path):
        """Draws norm by layer and spectrum by layer into a file, with matplotlib.

        Args:
            path: The picture's file; its ending says the format.

        Raises:
            ImportError: Without matplotlib.
            ValueError: If there is no row, or the ending is no format's.
        """
        draw(self, path)


def analyze(source: "keras.layers.Layer | Adapter | str | os.PathLike") -> Analysis:
    """Computes the singular values of every update scaling * A @ B.

    They say how far a layer has moved, absolutely and relative to its W, and how much
    of its rank it uses. If two of eight singular values hold 99% of the squares, rank
    2 is enough, and `combine_adapters([adapter], energy=0.99)` reduces to it. The
    updates themselves are not formed, except for convolutions with
    factorization="loralib".

    A kernel is taken as the matrix that multiplies the inputs of one output. A stack
    of matrices has the singular values of all of them. With DoRA, the rows describe
    scaling * A @ B, without m.

    Args:
        source: A model with adapters, an `Adapter`, or the folder of one.

    Returns:
        A sequence of rows with .path .rank .norm .relative_norm (over |W|, of a model)
        .singular_values and .effective_rank(energy), which prints as a table;
        `.plot(path)` draws it.

    Raises:
        ValueError: If there is no adapter, values are not finite, the model is inside
            `merged` or `disabled`, or an adapter's factors are matrices only together
            with their layer.
        OSError: If a file cannot be read.

    Examples:
        >>> rows = keras_lora.analyze(model)
        >>> [(row.path, row.rank) for row in rows]
        [('dense', 8)]
    """
    if isinstance(source, (str, os.PathLike)):
        return of_adapter(Adapter.read(source), Path(source).name)
    if isinstance(source, Adapter):
        return of_adapter(source, "an adapter")
    import keras  # here: a file is shown without it

    if isinstance(source, keras.layers.Layer):
        from keras_lora.files import analyze_model

        return analyze_model.of_model(source)
    raise ValueError(
        "`source` must be a model, an Adapter or a folder. Received: "
        f"{type(source).__name__}, {str(source)[:99]!r}."
    )


def of_adapter(adapter, name):
    file = factors_of(adapter, slots_of([adapter]))
    rows = [
        update(module, file.ranks[module], *file.product(module), file.scaling(module))
        for module in in_order(file.factors)
    ]
    return Analysis(name, rows, notes_of([method_in(file.method)]))


def notes_of(methods) -> list:
    """What the rows do not show of what methods train."""
    return [
        f"With {method.keyword}: rows are of scaling * A @ B, and not of "
        f"{method.beside_update}."
        for method in dict.fromkeys(methods)
        if method.beside_update
    ]


def update(path, rank, left, right, scaling=1.0, kernel=None):
    for values in (left, right):
        assert_finite(path, values)
    values = scaling * singular_values(left, right)
    norm = float(np.linalg.norm(values))
    relative = None if kernel is None else norm / kernel if kernel else math.inf
    return Update(path, rank, norm, relative, values)
