"""Which table `trainable_token_indices` means."""

from collections.abc import Mapping

from keras_lora.layers.kinds import looks_up
from keras_lora.layers.kinds import shape_of
from keras_lora.layers.settings import checked_indices
from keras_lora.layers.token_rows import KEYWORD
from keras_lora.layers.token_rows import refuse_outside
from keras_lora.models.sites import site_paths
from keras_lora.models.tables import listed
from keras_lora.models.targets import matching

# What the embedding of tokens is called where a model has others beside it.
TOKEN_TABLES = ("token_embedding", "embed_tokens", "word_embeddings", "tokens")


def token_sites(paths, given, trained) -> dict:
    """Path -> (site, indices): the tables and heads of which rows train.

    Args:
        paths: Path -> layer, of the whole model.
        given: Ids of tokens, or {path: ids}, or None.
        trained: Paths of layers that train in full.
    """
    if given is None:
        return {}
    sites = site_paths(paths)
    tables = {p: s for p, s in sites.items() if looks_up(s)}
    if isinstance(given, Mapping):
        chosen = {}
        for rule, indices in given.items():
            found = matching([rule], {**sites, **paths}, KEYWORD, tables)
            if len(found) != 1:
                raise ValueError(f"`{KEYWORD}` {rule!r} means {listed(found)}.")
            chosen[found[0]] = indices
    else:
        chosen = {token_table(tables): given}
    tokens = {}
    for path, indices in chosen.items():
        site = sites.get(path)
        if site is None or not (looks_up(site) or is_head(site)):
            raise ValueError(
                f"`{KEYWORD}` names {path!r}, which is no embedding and no Dense head."
            )
        if path in trained or any(path.startswith(f"{other}/") for other in trained):
            raise ValueError(f"{path!r} is in `{KEYWORD}` and in `also_train`.")
        indices = checked_indices(indices)
        refuse_outside(indices, shape_of(site)[0 if looks_up(site) else 1])
        tokens[path] = site, indices
    return tokens


def is_head(site):
    """Whether a kernel's columns are outputs: of a Dense layer, or an untied head."""
    weight = getattr(site, "weight_name", "kernel")
    return len(shape_of(site)) == 2 and weight in ("kernel", "reverse_embeddings")


def token_table(tables):
    """The path of the one table of tokens."""
    named = [p for p in tables if p.rpartition("/")[2] in TOKEN_TABLES]
    found = named if len(named) == 1 else list(tables)
    if len(found) != 1:
        raise ValueError(
            f"The model has {len(found)} embeddings"
            f"{f', {listed(found)}' if found else ''}: give `{KEYWORD}` as a dict "
            "from the path of a table to ids."
        )
    return found[0]


def refuse_both(tokens, chosen):
    """Raises for a table that is a target of LoRA too."""
    both = sorted(tokens.keys() & chosen.keys())
    if both:
        raise ValueError(
            f"{listed(both)} is in `{KEYWORD}` and in `target`: a table cannot have "
            "both an update and rows that train. Leave it out with exclude=."
        )
