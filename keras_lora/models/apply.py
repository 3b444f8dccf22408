"""apply_lora: layers of an existing model become LoRA layers, all of them or none."""

import contextlib
import dataclasses
import types
from collections.abc import Callable, Mapping, Sequence

import keras

from keras_lora.keras_internals import (
    classes,
    compiled,
    distribution,
    layer_state,
    processes,
    warn_caller,
)
from keras_lora.layers import arguments, kinds, settings, token_rows
from keras_lora.layers.lora_layer import LoRALayer
from keras_lora.models import keras_files, quantized, sites, targets, training_state
from keras_lora.models.choose import choose
from keras_lora.models.report import Report
from keras_lora.models.tables import join


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
        use_dora: Boolean, train the magnitudes of W + delta's columns separately, as
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
    with apply_tentatively(**locals()) as (report, change):
        report.is_dry_run = bool(dry_run)
        if not dry_run:
            processes.warn_of_process_group()
            report.notes += change.commit()
    return report


@contextlib.contextmanager
def apply_tentatively(model, **arguments):
    """Adapts a model inside the context; yields the report and the `Change`.

    Without a commit, the change is undone.

    Args:
        model: A Keras model.
        arguments: The others of `apply_lora`, all of them.
    """
    asked = types.SimpleNamespace(**arguments)
    settings.validate_bias(asked.bias)
    settings.Settings(asked.rank, asked.alpha, asked.use_rslora)
    settings.validate_dropout(asked.dropout)
    paths = sites.Paths(model)
    sites.refuse_unbuilt(model)
    sites.refuse_adapters(paths)
    trained = (
        targets.matching_paths(asked.also_train, paths.layers, "also_train")
        if asked.also_train
        else []
    )
    tokens = token_sites(paths, asked.trainable_token_indices, trained)
    chosen, skipped, notes = {}, {}, []
    if asked.target is None and not tokens:
        raise ValueError(
            f"target=None adapts no layer, so `{token_rows.KEYWORD}` must name tokens. "
            f"Received: {asked.trainable_token_indices!r}."
        )
    if asked.target is not None:
        chosen, skipped, notes = choose(paths, asked.target, asked.exclude, trained)
    refuse_both(tokens, chosen)
    ranks = targets.pattern_values(asked.rank_pattern, chosen, "rank_pattern")
    alphas = targets.pattern_values(asked.alpha_pattern, chosen, "alpha_pattern")
    adapters = {
        site: {
            "rank": ranks.get(path, asked.rank),
            "alpha": alphas.get(path, asked.alpha),
            "dropout": asked.dropout,
            "use_rslora": asked.use_rslora,
            "use_dora": asked.use_dora,
        }
        for path, site in chosen.items()
    }
    adapters |= {
        site: {token_rows.KEYWORD: indices} for site, indices in tokens.values()
    }
    also_train_layers = [paths.layers[path] for path in trained]
    without = [
        path for path, site in chosen.items() if not kinds.as_site(site).takes_dropout
    ]
    if asked.dropout and without:
        notes = [
            *notes,
            f"No dropout: {join(without)} (the adapter has no inputs)",
        ]
    with adapt_layers(paths, adapters) as change:
        warn_of_high_ranks(chosen)
        training_state.freeze_all_but_lora(model, asked.bias, also_train_layers)
        skipped = {p: why for p, why in skipped.items() if p not in tokens}
        yield Report(paths, skipped, notes), change


@contextlib.contextmanager
def adapt_layers(paths, adapters):
    """Adapts a model inside the context, and for good if `commit()` is called.

    Otherwise, or if anything fails, everything is restored: classes, order of weights,
    flags, records, the optimizer and compiled functions.

    Args:
        paths: The `Paths` of the model.
        adapters: Site -> the arguments of its adapter.
    """
    model, layers_and_model = paths.model, paths.with_model
    compiled.restore_jax_weights(model)
    processes.barrier(model)
    with distribution.strategy_scope(model), contextlib.ExitStack() as undo:
        new = {
            site: sites.new_adapter(site, options) for site, options in adapters.items()
        }
        undo.callback(
            layer_state.refresh_torch_parameters, layer_state.flatten_layers(model)
        )
        undo.callback(
            training_state.restore_flags,
            layers_and_model,
            training_state.trainable_flags(layers_and_model),
        )
        for layer in layers_and_model.values():
            record = training_state.record_of(layer)
            undo.callback(training_state.set_record, layer, record)
            if adapters:
                training_state.remember_flags(layer)
        for layer in dict.fromkeys(map(kinds.layer_of, new)):
            undo.callback(make_plain_again, layer)
        for site, adapter in new.items():
            sites.add_adapter(site, adapter)
        for layer in quantized.fix_quantized(layers_and_model.values()):
            undo.callback(sites.make_plain, layer)
        layer_state.refresh_torch_parameters(layer_state.flatten_layers(model))
        yield Change(model, undo)


def make_plain_again(layer):
    if isinstance(layer, LoRALayer):
        sites.make_plain(layer)


@dataclasses.dataclass(frozen=True)
class Change:
    """Changes that can be undone until `commit()` is called."""

    model: object
    undo: contextlib.ExitStack

    def commit(self) -> list:
        """Makes the changes permanent; returns notes about optimizers."""
        for layer in list(keras_files.layers_to_carry(self.model)):
            self.undo.callback(classes.change_class, layer, type(layer))
            cls = keras_files.carrier_class(type(layer))  # type: ignore[arg-type]
            classes.change_class(layer, cls)
        notes = compiled.compile_again(self.model)
        self.undo.pop_all()
        return notes


def mark_only_lora_as_trainable(model: keras.layers.Layer, bias: str = "none"):
    """Freezes everything except A, B and the chosen biases.

    Layers in which nothing trains are frozen as layers, so that batch
    normalization keeps its moving statistics. A model that was compiled is
    compiled again with the same settings; its optimizer starts afresh.

    Args:
        model: Any Keras model that holds LoRA layers.
        bias: "none": no bias trains. "lora_only": the biases of adapted layers
            train. "all": all biases train, also beta of normalization layers, but
            not of batch normalization.

    Raises:
        ValueError: If `bias` has another value, or there is no LoRA layer.

    Examples:
        >>> keras_lora.mark_only_lora_as_trainable(model, bias="lora_only")
        >>> len(model.trainable_variables)  # A, B and the bias
        3
    """
    settings.validate_bias(bias)
    sites.built_sites(model)
    with adapt_layers(sites.Paths(model), {}) as change:
        training_state.freeze_all_but_lora(model, bias)
        notes = change.commit()
    for note in notes:
        warn_caller(note)


def warn_of_high_ranks(chosen):
    """Warns once about all adapters whose rank exceeds that of their kernel."""
    limits = {p: x.form.highest_rank(x.kernel_shape) for p, x in chosen.items()}
    high = [f"{p!r} ({n})" for p, n in limits.items() if chosen[p].lora.rank > n]
    if high:
        warn_caller(
            "The rank is higher than any kernel of this size can have, which wastes "
            f"parameters, in {join(high)}. Give a lower `rank`, or set the rank of "
            "these layers with `rank_pattern`."
        )


# Names of the token embedding in models with several embeddings.
TOKEN_TABLES = ("token_embedding", "embed_tokens", "word_embeddings", "tokens")


def token_sites(paths, ids, trained) -> dict:
    """Path -> (site, indices), for the tables and heads of which some rows train.

    Args:
        paths: The `Paths` of the model.
        ids: Ids of tokens, or {path: ids}, or None.
        trained: Paths of layers that train in full.
    """
    if ids is None:
        return {}
    tables = {p: s for p, s in paths.sites.items() if kinds.looks_up(s)}
    if isinstance(ids, Mapping):
        chosen = {}
        for rule, indices in ids.items():
            matches = targets.matching_paths(
                [rule], {**paths.sites, **paths.layers}, token_rows.KEYWORD, tables
            )
            if len(matches) != 1:
                raise ValueError(
                    f"`{token_rows.KEYWORD}` {rule!r} must mean one table, and means "
                    f"{join(matches)}."
                )
            chosen[matches[0]] = indices
    else:
        chosen = {token_table(tables): ids}
    tokens = {}
    for path, indices in chosen.items():
        site = paths.sites.get(path)
        if site is None or not (kinds.looks_up(site) or is_head(site)):
            raise ValueError(
                f"`{token_rows.KEYWORD}` names {path!r}, which is neither an embedding "
                "nor a Dense head."
            )
        if path in trained or any(path.startswith(f"{other}/") for other in trained):
            raise ValueError(
                f"{path!r} is in `{token_rows.KEYWORD}` and in `also_train`."
            )
        indices = settings.validate_indices(indices)
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
    candidates = named if len(named) == 1 else list(tables)
    if len(candidates) != 1:
        raise ValueError(
            f"The model has {len(candidates)} embeddings"
            f"{f', {join(candidates)}' if candidates else ''}: give "
            f"`{token_rows.KEYWORD}` as a dict from the path of a table to ids."
        )
    return candidates[0]


def refuse_both(tokens, chosen):
    """Raises for a table that is also a LoRA target."""
    both = sorted(tokens.keys() & chosen.keys())
    if both:
        raise ValueError(
            f"{join(both)} is in `{token_rows.KEYWORD}` and in `target`: a table "
            "cannot have both an update and rows that train. Leave it out with "
            "exclude=."
        )
