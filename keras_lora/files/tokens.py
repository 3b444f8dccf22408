"""PEFT's trainable_token_indices: the rows of tables that train by themselves.

Of each table a file has one tensor, the rows in the order of the ids in the
configuration. In spite of its name it holds new rows and no difference.
"""

from keras_lora.files.config import CONFIG
from keras_lora.files.pair import TENSORS
from keras_lora.layers.method_files import TokenRowsFiles
from keras_lora.layers.settings import checked_indices
from keras_lora.layers.torch_layout import to_numpy

KEYWORD = TokenRowsFiles.keyword
SUFFIX = ".token_adapter.trainable_tokens_delta"


def rows_of(tables) -> dict:
    """Key -> rows. tables: module -> site."""
    return {module + SUFFIX: to_numpy(x.lora.rows) for module, x in tables.items()}


def take_rows(tensors) -> dict:
    """Takes the rows out of a file's tensors: {module: rows}."""
    keys = [key for key in tensors if key.endswith(SUFFIX)]
    return {key.removesuffix(SUFFIX): tensors.pop(key) for key in keys}


def checked_tokens(given) -> dict:
    """{module, or the end of one: ids}; "" is the model's table of tokens."""
    if not given:
        return {}
    named = given if isinstance(given, dict) else {"": given}
    try:
        return {name: checked_indices(indices) for name, indices in named.items()}
    except ValueError as error:
        raise ValueError(f"{CONFIG}: {error}") from error


def checked_rows(rows, tokens) -> dict:
    """{module: (ids, rows)}; a ValueError where configuration and tensors disagree."""
    found = {}
    for module, values in rows.items():
        names = [n for n in tokens if not n or f".{module}".endswith(f".{n}")]
        if len(names) != 1 or values.ndim != 2 or len(values) != len(tokens[names[0]]):
            raise ValueError(
                f"{TENSORS} has rows of shape {values.shape} for {module!r}, and "
                f"{CONFIG} has {KEYWORD}={tokens}: the two do not belong together."
            )
        found[module] = tokens[names[0]], values
    if len(found) < len(tokens):
        raise ValueError(f"{CONFIG} has {KEYWORD}={tokens}, and {TENSORS} no rows.")
    return found
