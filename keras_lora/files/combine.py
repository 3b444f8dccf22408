"""Sums of adapters, exact or cut to a rank."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from keras_lora.files.config import KEPT
from keras_lora.files.config import settings
from keras_lora.files.contents import factors_of
from keras_lora.files.contents import suffixes_of
from keras_lora.files.folder import Adapter
from keras_lora.files.slices import fuse
from keras_lora.files.slices import slices_of
from keras_lora.layers.settings import alpha_at
from keras_lora.layers.settings import checked_rank
from keras_lora.layers.settings import divisor
from keras_lora.layers.settings import is_number

BIASES = ("none", "lora_only", "all")


def combine_adapters(
    adapters: Sequence[Adapter | str | Path],
    weights: Sequence[float] | None = None,
    rank: int | None = None,
) -> Adapter:
    """The adapter whose updates are weighted sums of those of others.

        delta = sum over i of weights[i] * delta_i

    Exactly, with the factors side by side: A = [A_1; A_2; ...], and B likewise with
    weights and scalings in it, so that the ranks add up. With `rank` each sum is cut
    to the nearest update of that rank (its singular value decomposition), and
    `.errors` of the result says what that lost.

    Args:
        adapters: Folders, or `Adapter` values.
        weights: One number per adapter; the default is 1 for each.
        rank: Whole number > 0, the largest rank of the result; the default cuts
            nothing.

    Returns:
        An `Adapter`: `.save(directory)` writes it, and `load_adapter(model, adapter)`
        takes it. What one of the adapters trained in full goes along unweighted.

    Raises:
        ValueError: If there is no adapter, the weights do not fit, factors of one
            module have other shapes, two adapters trained the same layer in full, or
            one has DoRA's magnitudes.
        OSError: If a file cannot be read.
    """
    adapters = [x if isinstance(x, Adapter) else Adapter.read(x) for x in adapters]
    weights = checked_weights(weights, adapters)
    rank = None if rank is None else checked_rank(rank)
    counts = {m: len(r) for adapter in adapters for m, r in adapter.slices.items()}
    slots = [slot for module, n in counts.items() for slot in slices_of(module, n)]
    files = [factors_of(adapter, slots) for adapter in adapters]
    refuse_methods(files)
    use_rslora = all(file.config["use_rslora"] for file in files)
    tensors, ranks, alphas, errors = {}, {}, {}, {}
    for module in dict.fromkeys(m for file in files for m in file.factors):
        terms = [
            (file.factors[module], weight * scaling_of(file, module))
            for file, weight in zip(files, weights, strict=True)
            if module in file.factors
        ]
        first = next(file for file in files if module in file.factors)
        scaling = scaling_of(first, module)
        suffixes = suffixes_of(terms[0][0])
        assert_same_shapes(module, [pair for pair, _ in terms])
        a = np.concatenate([pair[suffixes[0]] for pair, _ in terms])
        b = np.concatenate(
            [pair[suffixes[1]] * (factor / scaling) for pair, factor in terms], axis=1
        )
        if rank is not None and len(a) > rank:
            a, b, errors[module] = cut(a, b, rank)
        tensors |= zip((module + suffix for suffix in suffixes), (a, b), strict=True)
        ranks[module] = len(a)
        alphas[module] = scaling * divisor(len(a), use_rslora)
        if use_rslora == first.config["use_rslora"]:  # exactly its own, for one
            own = first.alphas[module], first.ranks[module]
            alphas[module] = alpha_at(len(a), *own, use_rslora)
    slices = fuse(tensors, ranks, alphas, use_rslora)
    for file in files:
        for key, value in file.others.items():
            if key in tensors and not np.array_equal(tensors[key], value):
                raise ValueError(
                    f"Two of the adapters trained {key!r} in full; there is no sum of "
                    "that."
                )
            tensors[key] = value
    bias = max((file.config["bias"] for file in files), key=BIASES.index)
    said = {key: {x.config.get(key) for x in adapters} for key in KEPT}
    config = settings(
        ranks,
        alphas,
        use_rslora,
        lora_dropout=max(file.config["dropout"] for file in files),
        bias=None if bias == "none" else bias,
        modules_to_save=sorted({m for f in files for m in f.config["modules_to_save"]}),
        fan_in_fan_out=any(x.config.get("fan_in_fan_out") for x in adapters),
        **{key: found.pop() for key, found in said.items() if len(found) == 1},
    )
    return Adapter(tensors, config, slices, errors)


def refuse_methods(files):
    for word in [word for file in files for word in file.config["method"]]:
        raise ValueError(
            f"An adapter with {word} is no update that could be added to others. Load "
            "it into a model and merge it, `merge_lora(model)`; what "
            "`extract_adapter(base_model, model, rank)` gives can be combined."
        )


def scaling_of(file, module):
    return file.alphas[module] / divisor(file.ranks[module], file.config["use_rslora"])


def checked_weights(weights, adapters):
    if not adapters:
        raise ValueError("`adapters` is empty: there is nothing to combine.")
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    if len(weights) != len(adapters) or not all(
        is_number(weight) and math.isfinite(weight) for weight in weights
    ):
        raise ValueError(
            f"`weights` must be one finite number for each of {len(adapters)} "
            f"adapters. Received: weights={weights!r}."
        )
    return weights


def assert_same_shapes(module, pairs):
    """All but the rank, which is A's first axis and B's second."""
    for pair in pairs:
        if suffixes_of(pair) != suffixes_of(pairs[0]):
            raise ValueError(f"{module!r} is an embedding in some adapters only.")
        for place, suffix in enumerate(suffixes_of(pair)):
            shapes = [np.delete(p[suffix].shape, place) for p in (pair, pairs[0])]
            if not np.array_equal(*shapes):
                raise ValueError(
                    f"The factors of {module!r} have shapes {pair[suffix].shape} and "
                    f"{pairs[0][suffix].shape}: they are of other models."
                )


def cut(a, b, rank):
    """The nearest factors of a lower rank, and the relative error of their product."""
    columns = b.reshape(b.shape[0], b.shape[1]).astype("float64")
    rows = a.reshape(len(a), -1).astype("float64")
    # The product is never formed: its singular values are those of a small core.
    q_b, r_b = np.linalg.qr(columns)
    q_a, r_a = np.linalg.qr(rows.T)
    left, values, right = np.linalg.svd(r_b @ r_a.T)
    rank = min(rank, len(values))  # a small kernel has no more
    root = np.sqrt(values[:rank])
    new_b = (q_b @ left[:, :rank]) * root
    new_a = (right[:rank].T * root).T @ q_a.T
    error = np.linalg.norm(values[rank:]) / (np.linalg.norm(values) or 1.0)
    return (
        new_a.astype(a.dtype).reshape(-1, *a.shape[1:]),
        new_b.astype(b.dtype).reshape(len(b), -1, *b.shape[2:]),
        float(error),
    )
