"""Looks into adapters: spectra of updates, differences, and what engines refuse."""

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from keras_lora.files import factors
from keras_lora.files.folder import Adapter
from keras_lora.layers import settings, torch_layout
from keras_lora.layers.settings import Settings
from keras_lora.models import tables

if TYPE_CHECKING:
    import keras


class Update(NamedTuple):
    """One layer's update, scaling * A @ B, as a matrix (inputs, outputs).

    norm is the Frobenius norm; relative_norm is its ratio to the norm of W, None for an
    adapter without its model.
    """

    path: str
    rank: int
    norm: float
    relative_norm: float | None
    singular_values: np.ndarray

    def effective_rank(self, energy: float = 0.99) -> int:
        """How many singular values account for this share of the sum of squares."""
        return effective_rank(self.singular_values, energy)


class Analysis(tables.Rows):
    """Rows (.path .rank .norm .relative_norm .singular_values), which print as a table.

    Attributes:
        notes: Sentences below the table.
    """

    def __init__(self, name, rows, notes=()):
        self.name, self.rows, self.notes = name, list(rows), list(notes)

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
        line = "90%, 99%: how many singular values make up that share of the energy."
        return f"Updates of {self.name}", head, rows, [line, *self.notes]

    def plot(self, path):
        """Draws norm by layer and spectrum by layer into a file, with matplotlib.

        Args:
            path: The picture's file; its ending decides the format.

        Raises:
            ImportError: Without matplotlib.
            ValueError: If there are no rows, or the ending is of no known format.
        """
        tables.draw_analysis(self, path)


def analyze(source: "keras.layers.Layer | Adapter | str | os.PathLike") -> Analysis:
    """Computes the singular values of every update scaling * A @ B.

    They say how far a layer has moved, absolutely and relative to its W, and how much
    of its rank it uses. If two of eight singular values make up 99% of the sum of
    squares, their energy, rank 2 is enough: `combine_adapters([adapter], energy=0.99)`
    reduces the adapter to it. The updates themselves are not formed, except for
    convolutions with factorization="loralib".

    A kernel is treated as the matrix that maps the inputs of an output to it. A stack
    of matrices has the singular values of all of them. With DoRA, the rows describe
    scaling * A @ B, without m.

    Args:
        source: A model with adapters, an `Adapter`, or the folder of one.

    Returns:
        A sequence of rows with .path .rank .norm .relative_norm (divided by |W|, for a
        model) .singular_values and .effective_rank(energy). It prints as a table, and
        `.plot(path)` draws it.

    Raises:
        ValueError: If there is no adapter, values are not finite, the model is inside
            `merged` or `disabled`, or the factors in a file are not matrices without
            their layer.
        OSError: If a file cannot be read.

    Examples:
        >>> rows = keras_lora.analyze(model)
        >>> [(row.path, row.rank) for row in rows]
        [('dense', 8)]
    """
    if isinstance(source, (str, os.PathLike)):
        return analyze_adapter(Adapter.read(source), Path(source).name)
    if isinstance(source, Adapter):
        return analyze_adapter(source, "an adapter")
    import keras  # not needed to analyze a file

    if isinstance(source, keras.layers.Layer):
        return analyze_model(source)
    raise ValueError(
        "`source` must be a model, an Adapter or a folder. Received: "
        f"{type(source).__name__}, {str(source)[:99]!r}."
    )


def analyze_adapter(adapter, name):
    file = factors.factors_of(adapter)
    rows = [
        update(module, x.settings.rank, *x.product(), x.settings.scaling)
        for module in tables.sort_by_number(file.factors)
        for x in [file.factors[module]]
    ]
    notes = notes_of([torch_layout.method_in(file.config["method"])])
    return Analysis(name, rows, [*notes, *notes_of_tables(file.rows)])


def analyze_model(model):
    from keras_lora.models import sites

    sites.sites_outside_contexts(model)
    rows, methods, trained = [], [], []
    for path, site in sites.Paths(model).adapted.items():
        if site.lora.trains_rows:
            trained.append(path)
        else:
            kernel = torch_layout.to_numpy(site.base_kernel(site.lora.variable_dtype))
            norm, pair = np.linalg.norm(kernel), matrices(path, site)
            rows.append(update(path, site.lora.rank, *pair, kernel=norm))
            methods.append(type(site.lora))
    return Analysis(model.name, rows, [*notes_of(methods), *notes_of_tables(trained)])


def matrices(path, site):
    """Two matrices, or stacks of them, whose product is the update."""
    lora, form, to_numpy = site.lora, site.form, torch_layout.to_numpy
    if not {"a", "b"} <= set(lora.factor_names):
        raise ValueError(f"{path!r} has no A and B, but {lora.factor_names}.")
    if not form.is_product(site.kernel_shape):
        matrix = form.as_matrix(to_numpy(lora.delta()))
        return matrix, np.eye(matrix.shape[-1])
    a, b = lora.factors(lora.variable_dtype)
    a, b = to_numpy(a), to_numpy(form.spread(b))
    rank, lead = a.shape[-1], a.shape[: len(form.batch_axes)]
    return a.reshape(*lead, -1, rank), b.reshape(*lead, rank, -1)


def notes_of(methods) -> list:
    """Notes on what methods train and the rows do not show."""
    return [
        f"With {method.keyword}: the rows show scaling * A @ B, without "
        f"{method.also_trains}."
        for method in dict.fromkeys(methods)
        if method.also_trains
    ]


def notes_of_tables(paths) -> list:
    """A note on tables with trained rows, whose change is not a low-rank update."""
    names = tables.join(list(paths))
    return [f"Not shown: {names}, where only some rows train."] if paths else []


def update(path, rank, left, right, scaling=1.0, kernel=None):
    for values in (left, right):
        factors.refuse_not_finite(path, values)
    values = scaling * singular_values(left, right)
    norm = float(np.linalg.norm(values))
    relative = None if kernel is None else norm / kernel if kernel else math.inf
    return Update(path, rank, norm, relative, values)


def core(left, right):
    """Q1, C, Q2 of left @ right = Q1 @ C @ Q2^T, where C has the rank's size.

    left (..., m, r) and right (..., r, n). The columns of Q1 and of Q2 are
    orthonormal, so that the singular values of C are those of the product.
    """
    q_left, r_left = np.linalg.qr(left.astype("float64"))
    q_right, r_right = np.linalg.qr(transpose(right.astype("float64")))
    return q_left, r_left @ transpose(r_right), q_right


def singular_values(left, right):
    """Singular values of left @ right, or of all in a stack, the largest first."""
    values = np.linalg.svd(core(left, right)[1], compute_uv=False)
    return np.sort(values, axis=None)[::-1]


def effective_rank(values, energy):
    """How many of the largest values account for this share of the sum of squares."""
    sums = np.cumsum(np.square(values))
    if not len(sums) or sums[-1] == 0:
        return 0
    return int(np.searchsorted(sums, energy * sums[-1])) + 1


def truncate(left, right, rank):
    """The nearest factors of a lower rank, and the relative error of their product.

    A stack of matrices gets one rank for all of them.

    rank: a function of the singular values; of a stack, of their norms over it.
    """
    q_left, middle, q_right = core(left, right)
    rows, values, columns = np.linalg.svd(middle, full_matrices=False)
    norms = np.linalg.norm(values.reshape(-1, values.shape[-1]), axis=0)
    rank = min(rank(norms), len(norms))  # a small kernel has fewer values
    root = np.sqrt(values[..., :rank])
    error = np.linalg.norm(norms[rank:]) / (np.linalg.norm(norms) or 1.0)
    new_left = (q_left @ rows[..., :rank]) * root[..., None, :]
    new_right = root[..., None] * columns[..., :rank, :] @ transpose(q_right)
    return new_left, new_right, float(error)


def transpose(matrix):
    return np.swapaxes(matrix, -1, -2)


def settings_differences(one, two) -> list:
    """[key, first, second] for each setting that differs."""
    keys = sorted(one.config.keys() | two.config.keys())
    pairs = [(key, one.config.get(key), two.config.get(key)) for key in keys]
    return [
        [key, *("" if value is None else str(value) for value in values)]
        for key, *values in pairs
        if values[0] != values[1]
    ]


def tensor_differences(one, two) -> list:
    """[module or tensor, ranks, |one - two| over the larger] for what differs."""
    names = factors.slice_names([one, two])
    files = [factors.factors_of(adapter, names) for adapter in (one, two)]
    rows = []
    for module in tables.sort_by_number(
        files[0].factors.keys() | files[1].factors.keys()
    ):
        pair = [file.factors.get(module) for file in files]
        if difference := update_difference(*pair):
            ranks = [str(x.settings.rank if x else "-") for x in pair]
            rows.append([module, " and ".join(dict.fromkeys(ranks)), difference])
    full = [other_tensors(file) for file in files]
    for key in tables.sort_by_number(full[0].keys() | full[1].keys()):
        if difference := array_difference(*(tensors.get(key) for tensors in full)):
            rows.append([key, "", difference])
    return rows


def other_tensors(file):
    """Key -> array for everything but factors: heads, biases, DoRA's magnitudes."""
    arrays = {
        module + suffix: x.tensors[suffix]
        for module, x in file.factors.items()
        for suffix in x.other_suffixes
    }
    return file.weights | arrays


def update_difference(one, two):
    """The relative difference of two updates in words, None where they are equal."""
    if one is None or two is None:
        return f"only in the {'second' if one is None else 'first'}"
    if one.settings.scaling == two.settings.scaling and all(
        suffix in two.tensors
        and np.array_equal(one.tensors[suffix], two.tensors[suffix])
        for suffix in one.low_rank
    ):
        return None
    (b, a), (other_b, other_a) = one.product(), two.product()
    if b.shape[:-1] != other_b.shape[:-1] or a.shape[-1] != other_a.shape[-1]:
        return "different shapes"
    b, other_b = b * one.settings.scaling, other_b * two.settings.scaling
    both = np.concatenate([b, -other_b], -1), np.concatenate([a, other_a], -2)
    norms = [
        np.linalg.norm(singular_values(*pair))
        for pair in (both, (b, a), (other_b, other_a))
    ]
    return f"{norms[0] / (max(norms[1:]) or 1):.3g}"


def array_difference(one, two):
    if one is None or two is None:
        return f"only in the {'second' if one is None else 'first'}"
    if one.shape != two.shape:
        return "different shapes"
    if np.array_equal(one, two):
        return None
    scale = max(map(np.linalg.norm, (one, two)))
    return f"{np.linalg.norm(one.astype('float64') - two) / scale:.3g}"


# From the documentation of vLLM 0.22.1, read on 2026-11-25 (vllm.lora.peft_helper,
# vllm.lora.utils, vllm.config.lora).
VLLM = "vLLM 0.22 (its documentation of 2026-11-25)"


def check_adapter(
    adapter: Adapter | str | os.PathLike,
    engine: str = "vllm",
    max_lora_rank: int = 16,
) -> list:
    """Returns what a serving engine would refuse or misread in an adapter.

    Args:
        adapter: A folder, or an `Adapter`.
        engine: "vllm", by the rules in its documentation of 2026-11-25.
        max_lora_rank: The `--max-lora-rank` of the server.

    Returns:
        A list of sentences, empty if no problem was found. Which modules of a model
        the engine can adapt is not checked.

    Raises:
        ValueError: If the engine is unknown, or the adapter is damaged.
        OSError: If a file cannot be read.

    Examples:
        >>> keras_lora.mark_only_lora_as_trainable(model)
        >>> keras_lora.save_adapter(model, "adapter")
        >>> keras_lora.check_adapter("adapter", max_lora_rank=64)
        []
    """
    if engine != "vllm":
        raise ValueError(f"`engine` must be 'vllm'. Received: engine={engine!r}.")
    max_lora_rank = settings.validate_rank(max_lora_rank)
    adapter = adapter if isinstance(adapter, Adapter) else Adapter.read(adapter)
    file, problems = factors.factors_of(adapter, ()), []
    config = file.config
    if heads := config["modules_to_save"]:
        problems.append(
            f"{VLLM} refuses modules_to_save, here {heads}: train without "
            "`also_train`, or merge and serve the whole model."
        )
    for word in config["method"]:
        problems.append(
            f"{VLLM} refuses {word}: serve the merged model, or the nearest plain "
            "LoRA, which extract_adapter finds."
        )
    if config["bias"] != "none":
        problems.append(
            f"{VLLM} refuses trained biases, here bias={config['bias']!r}: train "
            'with bias="none".'
        )
    other_tensors = sorted(file.weights)
    if other_tensors and not heads and config["bias"] == "none":
        problems.append(
            f"{VLLM} refuses tensors other than A and B: {other_tensors[:5]}."
        )
    if file.rows:
        problems.append(
            f"{VLLM} refuses rows of tables, here {sorted(file.rows)}: train without "
            "`trainable_token_indices`, or merge and serve the whole model."
        )
    if not adapter.config.get("target_modules"):
        problems.append(f"{VLLM} needs target_modules, which the file lacks.")
    largest = max(file.factors.values(), key=lambda factors: factors.settings.rank)
    if largest.settings.rank > max_lora_rank:
        problems.append(
            f"{VLLM} refuses ranks above max_lora_rank={max_lora_rank}, and "
            f"{largest.module!r} has {largest.settings.rank}: start the server with a "
            "higher --max-lora-rank, or lower the rank with combine_adapters([adapter],"
            f" rank={max_lora_rank})."
        )
    usual = Settings(config["r"], config["lora_alpha"], config["use_rslora"])
    otherwise = [
        module
        for module, x in file.factors.items()
        if abs(x.settings.scaling - usual.scaling) > 1e-6 * usual.scaling
    ]
    if otherwise:
        problems.append(
            f"{VLLM} ignores rank_pattern and alpha_pattern: it would scale "
            f"{otherwise[:5]} by {usual.scaling:.4g}, which changes the adapter. Use "
            "one rank and one alpha for all layers, or the same ratio of the two."
        )
    return problems
