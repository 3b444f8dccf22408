"""apply_lora: layers of an existing model become LoRA layers, in place."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras

from keras_lora.keras_internals import processes, warn_caller
from keras_lora.layers import arguments, kinds, settings, token_rows
from keras_lora.layers.adapter import LowRankAdapter
from keras_lora.models import adapt, freezing, targets
from keras_lora.models.change import adapting
from keras_lora.models.choose import choose
from keras_lora.models.report import Report
from keras_lora.models.sites import layer_paths, site_paths
from keras_lora.models.tables import listed


@arguments.refusing_foreign_keywords
def apply_lora(
    model: keras.layers.Layer,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    target: str | Sequence | type | Callable | None = "all-linear",
    exclude: str | Sequence | type | Callable | None = None,
    rank_pattern: Mapping | None = None,
    alpha_pattern: Mapping | None = None,
    use_rslora: bool = False,
    use_dora: bool = False,
    bias: str = "none",
    also_train: str | Sequence | type | Callable | None = None,
    dry_run: bool = False,
    trainable_token_indices: Sequence | Mapping | None = None,
) -> Report:
    """Adds adapters to layers of a model, in place, and freezes the rest.

        W -> W frozen, with A and B trainable and delta = scaling * A @ B

    The layer objects stay the same; their class becomes the LoRA class. The outputs
    do not change at first. A compiled model is compiled again with the same settings:
    an optimizer without state is kept, one with state is replaced by a copy without
    state. `merge_lora` and `remove_lora` undo the change.

    Args:
        model: A Keras model that is built, or a layer.
        rank: Whole number > 0, the rank r of every update.
        alpha: Number > 0, default the layer's rank. The update is scaled by
            alpha / rank.
        dropout: Number in [0, 1), the dropout on the adapters' inputs in training.
            Layers whose adapter has no inputs, such as embeddings, get none.
        target: Which weights to adapt. "all-linear": the kernels of Dense, EinsumDense,
            convolutions (transposed and pointwise ones too) and recurrent layers,
            except layers that make the model's outputs. "all": every weight that can
            have an adapter, also embeddings, depthwise kernels and experts. Any other
            string is a regular expression for a whole path (encoder/query). A list
            holds paths, ends of paths, layer names or classes. It can also be a layer
            class, or a function of (path, layer). A rule that names a layer means all
            its weights; "lstm/recurrent_kernel" is one weight of a layer.
        exclude: The same kinds of rule, for layers to leave out.
        rank_pattern: Dict from regular expressions for ends of paths to ranks.
        alpha_pattern: Dict from regular expressions for ends of paths to alphas.
        use_rslora: Boolean, scale by alpha / sqrt(rank).
        use_dora: Boolean, train the lengths of the columns of W + delta separately, as
            `layer.lora.magnitude` (DoRA). A training step costs more, with dropout or
            on an embedding much more.
        bias: Which biases train: "none", "lora_only" (of adapted layers) or "all".
        also_train: Layers that train in full, such as a new head; a rule like
            `target`.
        dry_run: Boolean, only report what would be done.
        trainable_token_indices: Ids of tokens. Their rows of the model's token
            embedding train, in float32, and its other rows stay frozen. Or a dict from
            the paths of tables, or of Dense heads, to ids. A tied head uses the
            trained rows too. With target=None, nothing else gets an adapter.

    Returns:
        A sequence of rows with .path .layer .weight .rank .alpha, which prints as a
        table. `.skipped` maps the paths of weights that were left out to the reason
        and what to do; `.notes` has more remarks, such as layers without dropout.

    Raises:
        ValueError: If an argument is out of range or has another library's name, a rule
            matches nothing, a layer that is named cannot be adapted, or the model has
            adapters already. The model is left unchanged.

    Examples:
        >>> report = keras_lora.apply_lora(base, rank=4, also_train=["dense_1"])
        >>> [(row.path, row.rank) for row in report]
        [('dense', 4)]

    Reference:
        [LoRA: Hu et al., 2021](https://arxiv.org/abs/2106.09685);
        [DoRA: Liu et al., 2024](https://arxiv.org/abs/2402.09353)
    """
    request = Request(
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        target=target,
        exclude=exclude,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        use_rslora=use_rslora,
        use_dora=use_dora,
        bias=bias,
        also_train=also_train,
        trainable_token_indices=trainable_token_indices,
    )
    with applied(model, request) as (report, change):
        report.is_dry_run = bool(dry_run)
        if not dry_run:
            processes.warn_of_process_group()
            report.notes += change.keep()
    return report


@dataclasses.dataclass(frozen=True)
class Request:
    """Arguments of `apply_lora`, without the model and `dry_run`."""

    rank: int
    alpha: float | None
    dropout: float
    target: Any
    exclude: Any
    rank_pattern: Mapping | None
    alpha_pattern: Mapping | None
    use_rslora: bool
    use_dora: bool
    bias: str
    also_train: Any
    trainable_token_indices: Any

    def options(self, ranks, alphas, path) -> dict:
        """The arguments of the adapter at a path."""
        return {
            "rank": ranks.get(path, self.rank),
            "alpha": alphas.get(path, self.alpha),
            "dropout": self.dropout,
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
        }


@contextlib.contextmanager
def applied(model, request: Request):
    """Yields the adapted model's report; the change is undone unless it is kept."""
    settings.checked_bias(request.bias)
    LowRankAdapter(  # checks the arguments
        request.rank, request.alpha, request.dropout, request.use_rslora
    )
    paths = layer_paths(model)
    adapt.refuse_unbuilt(model)
    adapt.refuse_adapters(paths)
    also_train = request.also_train
    trained = targets.matching(also_train, paths, "also_train") if also_train else []
    tokens = token_sites(paths, request.trainable_token_indices, trained)
    chosen, skipped, notes = {}, {}, []
    if request.target is not None or not tokens:
        chosen, skipped, notes = choose(
            model, paths, request.target, request.exclude, trained
        )
    refuse_both(tokens, chosen)
    ranks = targets.pattern_values(request.rank_pattern, chosen, "rank_pattern")
    alphas = targets.pattern_values(request.alpha_pattern, chosen, "alpha_pattern")
    adapters = {
        site: request.options(ranks, alphas, path) for path, site in chosen.items()
    }
    adapters |= {
        site: {token_rows.KEYWORD: indices} for site, indices in tokens.values()
    }
    heads = [paths[path] for path in trained]
    without = [path for path, site in chosen.items() if not kinds.takes_dropout(site)]
    if request.dropout and without:
        notes = [*notes, f"No dropout: {listed(without)} (the adapter has no inputs)"]
    with adapting(model, paths, adapters) as change:
        warn_of_high_ranks(chosen)
        freezing.freeze_all_but_lora(model, request.bias, heads)
        skipped = {p: why for p, why in skipped.items() if p not in tokens}
        yield Report(model, paths, skipped, notes), change


def warn_of_high_ranks(layers):
    """Warns once about all adapters whose rank exceeds that of their kernel."""
    limits = {p: x.form.highest_rank(x.kernel_shape) for p, x in layers.items()}
    high = [f"{p!r} ({n})" for p, n in limits.items() if layers[p].lora.rank > n]
    if high:
        warn_caller(
            "The rank is higher than any kernel of this size can have, which wastes "
            f"parameters, in {listed(high)}. Give a lower `rank`, or set the rank of "
            "these layers with `rank_pattern`."
        )


# Names of the token embedding in models with several embeddings.
TOKEN_TABLES = ("token_embedding", "embed_tokens", "word_embeddings", "tokens")


def token_sites(paths, given, trained) -> dict:
    """Path -> (site, indices), for the tables and heads of which some rows train.

    Args:
        paths: Path -> layer, of the whole model.
        given: Ids of tokens, or {path: ids}, or None.
        trained: Paths of layers that train in full.
    """
    if given is None:
        return {}
    sites = site_paths(paths)
    tables = {p: s for p, s in sites.items() if kinds.looks_up(s)}
    if isinstance(given, Mapping):
        chosen = {}
        for rule, indices in given.items():
            found = targets.matching(
                [rule], {**sites, **paths}, token_rows.KEYWORD, tables
            )
            if len(found) != 1:
                raise ValueError(
                    f"`{token_rows.KEYWORD}` {rule!r} must mean one table, and means "
                    f"{listed(found)}."
                )
            chosen[found[0]] = indices
    else:
        chosen = {token_table(tables): given}
    tokens = {}
    for path, indices in chosen.items():
        site = sites.get(path)
        if site is None or not (kinds.looks_up(site) or is_head(site)):
            raise ValueError(
                f"`{token_rows.KEYWORD}` names {path!r}, which is neither an embedding "
                "nor a Dense head."
            )
        if path in trained or any(path.startswith(f"{other}/") for other in trained):
            raise ValueError(
                f"{path!r} is in `{token_rows.KEYWORD}` and in `also_train`."
            )
        indices = settings.checked_indices(indices)
        token_rows.refuse_outside(
            indices, kinds.shape_of(site)[0 if kinds.looks_up(site) else 1]
        )
        tokens[path] = site, indices
    return tokens


def is_head(site):
    """Whether a site is the kernel of a Dense layer or of an untied head."""
    weight = getattr(site, "weight_name", "kernel")
    return len(kinds.shape_of(site)) == 2 and weight in ("kernel", "reverse_embeddings")


def token_table(tables):
    """Returns the path of the model's token embedding."""
    named = [p for p in tables if p.rpartition("/")[2] in TOKEN_TABLES]
    found = named if len(named) == 1 else list(tables)
    if len(found) != 1:
        raise ValueError(
            f"The model has {len(found)} embeddings"
            f"{f', {listed(found)}' if found else ''}: give `{token_rows.KEYWORD}` as "
            "a dict from the path of a table to ids."
        )
    return found[0]


def refuse_both(tokens, chosen):
    """Raises for a table that is also a LoRA target."""
    both = sorted(tokens.keys() & chosen.keys())
    if both:
        raise ValueError(
            f"{listed(both)} is in `{token_rows.KEYWORD}` and in `target`: a table "
            "cannot have both an update and rows that train. Leave it out with "
            "exclude=."
        )
