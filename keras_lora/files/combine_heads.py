"""What several adapters have trained in full, of which there is no sum."""

from pathlib import Path

import numpy as np

from keras_lora.files.folder import Adapter


def in_full(files, heads) -> dict:
    """Key -> what trained in full, where the adapters agree or `heads` decides."""
    tensors = {}
    for key in dict.fromkeys(key for file in files for key in file.others):
        values = {n: x.others[key] for n, x in enumerate(files) if key in x.others}
        tensors[key], *others = values.values()
        if all(np.array_equal(value, tensors[key]) for value in others):
            continue
        if heads in values:
            tensors[key] = values[heads]
        elif heads != "average":
            raise ValueError(
                f"Several adapters trained {key!r} in full; there is no sum of that. "
                'Choose with heads="average", or heads= and the place or the folder '
                f"of one to keep: they are at {', '.join(map(str, values))}."
            )
        elif len({value.shape for value in values.values()}) > 1:
            raise ValueError(
                f"{key!r} has several shapes: they belong to different models."
            )
        else:
            mean = np.mean(list(values.values()), axis=0, dtype="float64")
            tensors[key] = mean.astype(tensors[key].dtype)
    return tensors


def checked_heads(heads, adapters):
    """None, "average", or a place."""
    if heads is None or heads == "average":
        return heads
    folders = {n: Path(x) for n, x in enumerate(adapters) if not isinstance(x, Adapter)}
    if isinstance(heads, (str, Path)):
        meant = {Path(heads)}
        found = [n for n, x in folders.items() if meant & {x, Path(x.name)}]
    else:
        found = [n for n in range(len(adapters)) if type(heads) is int and n == heads]
    if len(found) != 1:
        raise ValueError(
            '`heads` must be "average", a place in `adapters`, counted from 0, or the '
            f"name of one folder there. Received: heads={heads!r}, folders "
            f"{[str(x) for x in folders.values()]}."
        )
    return found[0]
