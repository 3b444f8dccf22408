"""The paper's parameter counts, from shapes alone: no weight is allocated."""

import keras
import pytest

from keras_lora import LoRADense, LoRAEinsumDense, LoRAMergedDense


def factor_parameters(layer, inputs):
    """A + B of a layer that is built in a scope in which nothing is allocated."""
    with keras.src.backend.StatelessScope(initialize_variables=False):
        layer.build((None, None, inputs))
        factors = [layer.lora.a, layer.lora.b]
        assert all(factor._value is None for factor in factors)
        return sum(int(keras.ops.prod(factor.shape)) for factor in factors)


# model, width, blocks, rank, count; query and value are adapted in every block.
ROWS = [
    ("RoBERTa base", 768, 12, 8, 294_912),
    ("RoBERTa large", 1024, 24, 8, 786_432),
    ("DeBERTa XXL", 1536, 48, 16, 4_718_592),
    ("GPT-3", 12288, 96, 1, 4_718_592),
    ("GPT-3", 12288, 96, 8, 37_748_736),
    ("GPT-2 medium", 1024, 24, 4, 393_216),
    ("GPT-2 large", 1280, 36, 4, 737_280),
]
over_rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]} r={row[3]}")


@over_rows
def test_two_projections(row):
    _, width, blocks, rank, expected = row
    layer = LoRADense(width, rank=rank, use_bias=False)
    assert 2 * blocks * factor_parameters(layer, width) == expected


@over_rows
def test_one_fused_projection(row):
    _, width, blocks, rank, expected = row
    layer = LoRAMergedDense(3 * width, rank=rank, enable_lora=(True, False, True))
    assert blocks * factor_parameters(layer, width) == expected


@over_rows
def test_attention_heads_share_the_rank(row):
    _, width, blocks, rank, expected = row
    layer = LoRAEinsumDense("abc,cde->abde", (None, width // 64, 64), rank=rank)
    assert 2 * blocks * factor_parameters(layer, width) == expected
