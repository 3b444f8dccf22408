"""LoRAMergedDense: several projections in one kernel, some of them adapted."""

import dataclasses

import keras
import numpy as np
from keras import ops

from keras_lora.layers import form, loralib
from keras_lora.layers.dense import LoRADense


@keras.saving.register_keras_serializable(package="keras_lora")
class LoRAMergedDense(LoRADense):
    """Dense layer whose kernel is n slices side by side, G of them adapted.

    It is used for one kernel of query, key and value, of which query and value are
    adapted: `LoRAMergedDense(3 * dim, enable_lora=(True, False, True))`. Each adapted
    slice g has its own update of rank r:

        delta[:, slice g] = scaling * A[:, g*r:(g+1)*r] @ B[g]      adapted slices
        delta[:, slice]   = 0                                       the others

        W   (inputs, units)      frozen
        A   (inputs, G * rank)   starts as U(±1/sqrt(inputs))
        B   (G, rank, units/n)   starts as 0

    It equals n LoRADense layers on the same input, concatenated, of which n - G have no
    adapter and all share one dropout mask. At the start B = 0, and the layer equals
    `keras.layers.Dense`, whose arguments it takes.

    Args:
        enable_lora: One Boolean per slice, at least one of them True. `units` must be
            divisible by their number.

    Input shape: `(..., inputs)`. Output shape: `(..., units)`.

    Examples:
        >>> layer = LoRAMergedDense(96, rank=4, enable_lora=(True, False, True))
        >>> tuple(layer(keras.ops.ones((2, 32))).shape)
        (2, 96)

    Reference: `MergedLinear` in https://github.com/microsoft/LoRA
    """

    plain_class = keras.layers.Dense
    kernel_is_matrix = False  # but several, side by side
    adapted_slices = (True,)

    def __init__(self, units, *args, enable_lora: tuple = (True,), **kwargs):
        super().__init__(units, *args, **kwargs)
        self.adapted_slices = loralib.validate_mask(enable_lora, units)

    def low_rank_form(self, rank):
        inputs, units = self.kernel_shape
        adapted = sum(self.adapted_slices)
        return dataclasses.replace(
            super().low_rank_form(rank),
            a_shape=(inputs, adapted * rank),
            b_shape=(adapted, rank, units // len(self.adapted_slices)),
            compose=lambda a, b: ops.matmul(a, self.spread(b)),
            up=lambda hidden, b: ops.matmul(hidden, self.spread(b)),
            adapted_outputs=np.repeat(
                self.adapted_slices, units // len(self.adapted_slices)
            ),
            spread=self.spread,
            up_by_row=self._up_by_row,
            to_file=lambda a, b: (a.T, ops.convert_to_numpy(self.spread(b)).T),
            from_file=lambda a, b: gather_blocks(self, a.T, b.T),
            file_rank=adapted * rank,
            one_rank=False,
        )

    def spread(self, b):
        """Returns B in block form, (G * rank, units): block g in adapted slice g."""
        placement = np.eye(len(self.adapted_slices))[list(self.adapted_slices)]
        blocks = ops.einsum("grn,gs->grsn", b, ops.cast(placement, b.dtype))
        return ops.reshape(blocks, (-1, self.units))

    def _up_by_row(self, hidden, b, slots):
        blocks = ops.vectorized_map(self.spread, ops.take(b, slots, axis=0))
        return form.matmul_by_row(hidden, blocks, ops.arange(ops.shape(slots)[0]))

    @classmethod
    def read_loralib(cls, layer, a, b, rank, mask, module):
        return loralib.convert_merged_linear(
            layer, a, b, rank, layer.adapted_slices, module
        )

    def get_config(self):
        return {**super().get_config(), "enable_lora": list(self.adapted_slices)}


def gather_blocks(layer, a, blocks):
    """Returns A and B of a layer from A and B in block form, in any order of ranks.

    Each row of the block form must be zero outside of one adapted slice.
    """
    groups, rank, size = layer.lora.b.shape
    adapted = list(np.flatnonzero(layer.adapted_slices))
    parts = blocks.reshape(groups * rank, -1, size)
    rows = [[] for _ in adapted]
    zero_rows = []
    for row, used in enumerate(parts.any(axis=2)):
        numbers = np.flatnonzero(used)
        if len(numbers) == 0:
            zero_rows.append(row)
        elif len(numbers) == 1 and numbers[0] in adapted:
            rows[adapted.index(numbers[0])].append(row)
        else:
            rows[0] += range(rank + 1)  # too many, which raises below
    if any(len(row_numbers) > rank for row_numbers in rows):
        raise ValueError(
            "B is not zero outside the blocks of the adapted slices "
            f"{layer.adapted_slices}: it is another layer's adapter."
        )
    for row in zero_rows:  # in their own block, if it has room
        row_numbers = rows[row // rank]
        if len(row_numbers) == rank:
            row_numbers = next(other for other in rows if len(other) < rank)
        row_numbers.append(row)
    order = [row for row_numbers in rows for row in sorted(row_numbers)]
    pairs = zip(map(sorted, rows), adapted, strict=True)
    return a[:, order], np.stack([parts[pair] for pair in pairs])
