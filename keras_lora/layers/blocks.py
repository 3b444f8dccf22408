"""The factors of slices side by side, out of the one pair that a file has of them."""

import numpy as np


def gathered(layer, a, blocks):
    """A and B for a layer from arrays A and `spread` B, in any order of ranks.

    Each row of the block form must be zero outside of one adapted slice.
    """
    groups, rank, size = layer.lora.b.shape
    slots = list(np.flatnonzero(layer.adapted_slices))
    parts = blocks.reshape(groups * rank, -1, size)
    rows = [[] for _ in slots]
    zero_rows = []
    for row, used in enumerate(parts.any(axis=2)):
        slot = np.flatnonzero(used)
        if len(slot) == 0:
            zero_rows.append(row)
        elif len(slot) == 1 and slot[0] in slots:
            rows[slots.index(slot[0])].append(row)
        else:
            rows[0] += range(rank + 1)  # fits nowhere
    if any(len(own) > rank for own in rows):
        raise ValueError(
            "B is not zero outside the blocks of the adapted slices "
            f"{layer.adapted_slices}: it is another layer's adapter."
        )
    for row in zero_rows:  # where they stand, if there is room
        own = rows[row // rank]
        if len(own) == rank:
            own = next(other for other in rows if len(other) < rank)
        own.append(row)
    order = [row for own in rows for row in sorted(own)]
    b = [parts[own, slot] for own, slot in zip(map(sorted, rows), slots, strict=True)]
    return a[:, order], np.stack(b)
