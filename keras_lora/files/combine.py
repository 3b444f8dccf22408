"""Sums of adapters, exact or of a lower rank."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from keras_lora.files import analyze, config, experts, factors, slices, validation
from keras_lora.files.folder import Adapter
from keras_lora.keras_internals import warn_caller
from keras_lora.layers import settings
from keras_lora.models import tables

BIAS_ORDER = ("none", "lora_only", "all")  # each includes those before it


def combine_adapters(
    adapters: Sequence[Adapter | str | Path],
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    energy: float | None = None,
    heads: int | str | Path | None = None,
) -> Adapter:
    """Returns the weighted sum of several adapters as one adapter.

        delta = sum over i of weights[i] * delta_i

    The sum is exact: A = [A_1; A_2; ...] stacks the factors of all adapters, and so
    does B, with their weights and scalings. The ranks add up. With `rank` or `energy`,
    each sum is replaced by the nearest update of a lower rank (by singular value
    decomposition), and `.errors` of the result has the relative errors. A single
    adapter is reduced in the same way: `combine_adapters([adapter], energy=0.99)`.

    Args:
        adapters: Folders, or `Adapter` values.
        weights: One number per adapter; the default is 1 for each.
        rank: Whole number > 0, the highest rank of the result. By default, no rank is
            lowered.
        energy: Number in (0, 1] instead of `rank`: each module gets the lowest rank
            that keeps this share of the squares of its update's singular values
            (`analyze` shows them); its error is at most sqrt(1 - energy).
        heads: What to do with heads, biases and table rows that several adapters have
            trained in full, to different values. "average" takes their mean. A
            position in `adapters`, or the name of a folder there, keeps the values of
            that adapter. By default this is an error.

    Returns:
        An `Adapter`: `.save(directory)` writes it, and `load_adapter(model, adapter)`
        reads it. Layers that trained in full are not multiplied by the weights.

    Raises:
        ValueError: If there is no adapter, the number of weights differs, or `rank` and
            `energy` are both given. If factors of one module have different shapes or
            are not matrices. If several adapters trained the same layer in full and
            `heads` is not given, or different rows of one table. If one uses DoRA.
        OSError: If a file cannot be read.

    Examples:
        >>> keras_lora.save_adapter(model, "adapter")
        >>> half = keras_lora.combine_adapters(["adapter"], weights=[0.5], rank=2)
        >>> half.save("half")
    """
    if isinstance(adapters, (str, Path, Adapter)):
        raise ValueError(f"`adapters` must be a list. Received: {adapters!r}.")
    adapters = list(adapters)
    heads = validate_heads(heads, adapters)
    opened = [x if isinstance(x, Adapter) else Adapter.read(x) for x in adapters]
    weights = validate_weights(weights, opened)
    limit = rank_limit(rank, energy)
    names = factors.slice_names(opened)
    files = [factors.factors_of(adapter, names) for adapter in opened]
    refuse_methods(files)
    modules = [m for file in files for m in (*file.factors, *file.rows)]
    if len(files) > 1 and len(set(modules)) == len(modules):
        warn_caller(
            "The adapters have no module in common. The result fits a model that has "
            f"all of their modules, {tables.join(sorted(modules), most=4)}."
        )
    for file in files:
        for term in file.factors.values():
            term.product()  # raises if they are not matrices
    use_rslora = all(file.config["use_rslora"] for file in files)
    tensors, new_settings, errors = {}, {}, {}
    for module in dict.fromkeys(m for file in files for m in file.factors):
        terms = [
            (file.factors[module], weight)
            for file, weight in zip(files, weights, strict=True)
            if module in file.factors
        ]
        first, _ = terms[0]
        refuse_different_shapes(module, [term for term, _ in terms])
        pairs = [[term.tensors[x] for x in first.low_rank] for term, _ in terms]
        scaling = first.settings.scaling
        scales = [weight * term.settings.scaling / scaling for term, weight in terms]
        a = np.concatenate([a for a, _ in pairs])
        b = np.concatenate(
            [b * scale for (_, b), scale in zip(pairs, scales, strict=True)], axis=1
        )
        if limit is not None:
            stack = b.shape[2] if first.is_stack else 1
            left, right, error = analyze.truncate(
                b.reshape(len(b), -1, stack).transpose(2, 0, 1),
                a.reshape(len(a), stack, -1).transpose(1, 0, 2),
                limit,
            )
            if right.shape[1] < len(a):
                errors[module] = error
                right, left = right.transpose(1, 0, 2), left.transpose(1, 2, 0)
                a = right.astype(a.dtype).reshape(-1, *a.shape[1:])
                b = left.astype(b.dtype).reshape(len(b), -1, *b.shape[2:])
        keys = (module + suffix for suffix in first.low_rank)
        tensors |= zip(keys, (a, b), strict=True)
        new_settings[module] = first.settings.with_rank(len(a), use_rslora)
    slice_ranks = slices.fuse(tensors, new_settings)
    tensors |= combine_full_weights(files, heads)
    ids = {m: list(own) for file in files for m, (own, _) in file.rows.items()}
    bias = max((file.config["bias"] for file in files), key=BIAS_ORDER.index)
    facts = {key: {x.config.get(key) for x in opened} for key in config.FACTS}
    new_config = config.make_config(
        new_settings,
        lora_dropout=max(file.config["dropout"] for file in files),
        bias=None if bias == "none" else bias,
        modules_to_save=sorted({m for f in files for m in f.config["modules_to_save"]}),
        fan_in_fan_out=any(x.config.get("fan_in_fan_out") for x in opened),
        parameters=experts.parameters_in(
            new_settings, {x for f in files for x in f.config["target_parameters"]}
        ),
        **{key: values.pop() for key, values in facts.items() if len(values) == 1},
        **{validation.KEYWORD: ids},
    )
    return Adapter(tensors, new_config, slice_ranks, errors)


def refuse_methods(files):
    for word in [word for file in files for word in file.config["method"]]:
        raise ValueError(
            f"Adapters with {word} cannot be added. Load the adapter into a model, "
            "call `merge_lora(model)`, and combine what `extract_adapter(base_model, "
            "model, rank)` returns."
        )


def validate_weights(weights, adapters):
    if not adapters:
        raise ValueError("`adapters` is empty: there is nothing to combine.")
    if settings.is_number(weights):
        weights = [weights]
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    if len(weights) != len(adapters) or not all(
        settings.is_number(weight) and math.isfinite(weight) for weight in weights
    ):
        raise ValueError(
            f"`weights` must be one finite number for each of {len(adapters)} "
            f"adapters. Received: weights={weights!r}."
        )
    return weights


def refuse_different_shapes(module, terms):
    """Raises if shapes differ in more than the rank, A's first axis and B's second."""
    first = terms[0]
    for term in terms:
        if term.low_rank != first.low_rank:
            raise ValueError(
                f"{module!r} is an embedding in only some of the adapters."
            )
        for axis, suffix in enumerate(term.low_rank):
            both = (term.tensors[suffix], first.tensors[suffix])
            shapes = [np.delete(value.shape, axis) for value in both]
            if not np.array_equal(*shapes):
                shape, other_shape = (value.shape for value in both)
                raise ValueError(
                    f"The factors of {module!r} have shapes {shape} and {other_shape}: "
                    "they belong to different models."
                )


def rank_limit(rank, energy):
    """Returns a function from singular values to the rank to keep, or None."""
    if rank is not None and energy is not None:
        raise ValueError(
            f"`rank` and `energy` cannot be used together. Received: rank={rank!r}, "
            f"energy={energy!r}."
        )
    if energy is None:
        rank = None if rank is None else settings.validate_rank(rank)
        return None if rank is None else lambda values: rank
    if not settings.is_number(energy) or not 0 < energy <= 1:
        raise ValueError(
            "`energy` must be a number in (0, 1], the share of the squares of an "
            f"update's singular values to keep. Received: energy={energy!r}."
        )
    return lambda values: max(1, analyze.effective_rank(values, energy))


def combine_full_weights(files, heads) -> dict:
    """Key -> what trained in full, where the adapters agree or `heads` decides."""
    tensors = {}
    weights = [file.weights | token_rows(file, files) for file in files]
    for key in dict.fromkeys(key for own in weights for key in own):
        values = {n: own[key] for n, own in enumerate(weights) if key in own}
        tensors[key], *others = values.values()
        if all(np.array_equal(value, tensors[key]) for value in others):
            continue
        if heads in values:
            tensors[key] = values[heads]
        elif heads != "average":
            raise ValueError(
                f"Several adapters trained {key!r} in full, to different values. Give "
                'heads="average", or as `heads` the position or folder of the one to '
                f"keep: positions {', '.join(map(str, values))} have it."
            )
        elif len({value.shape for value in values.values()}) > 1:
            raise ValueError(
                f"{key!r} has several shapes in the adapters: they belong to different "
                "models."
            )
        else:
            mean = np.mean(list(values.values()), axis=0, dtype="float64")
            tensors[key] = mean.astype(tensors[key].dtype)
    return tensors


def token_rows(file, files) -> dict:
    """Key -> the rows of a table that a file trains, the same ones in all files."""
    for module, (ids, _) in file.rows.items():
        for other in files:
            other_ids, _ = other.rows.get(module, (ids, None))
            if list(other_ids) != list(ids):
                raise ValueError(
                    f"The adapters train different rows of {module!r}: {list(ids)} and "
                    f"{list(other_ids)}. Only adapters that train the same rows, in "
                    "the same order, can be combined."
                )
    suffix = validation.SUFFIX
    return {module + suffix: rows for module, (_, rows) in file.rows.items()}


def validate_heads(heads, adapters):
    """Returns None, "average", or a position."""
    if heads is None or heads == "average":
        return heads
    folders = {n: Path(x) for n, x in enumerate(adapters) if not isinstance(x, Adapter)}
    if isinstance(heads, (str, Path)):
        meant = {Path(heads)}
        positions = [n for n, x in folders.items() if meant & {x, Path(x.name)}]
    else:
        positions = [
            n for n in range(len(adapters)) if type(heads) is int and n == heads
        ]
    if len(positions) != 1:
        raise ValueError(
            '`heads` must be "average", a position in `adapters`, counted from 0, or '
            f"the name of one folder there. Received: heads={heads!r}, folders "
            f"{[str(x) for x in folders.values()]}."
        )
    return positions[0]
