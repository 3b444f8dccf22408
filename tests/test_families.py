"""Adapters of every family in transformers and here, both ways, run live."""

import pytest
from families import FAMILIES, TITLE, exchange
from layer_cases import slow_but
from page_sections import PAGE, sections

# One for each way in which modules differ: a head, fused and transposed projections,
# rotary halves, experts, two stacks, images.
FIRST = ("bert", "gpt2", "mixtral")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", slow_but(FIRST, FAMILIES))
def test_adapters_of_a_family_go_both_ways(name, tmp_path):
    row = exchange(name, tmp_path)
    assert row.layers >= 6
    assert max(row.base, row.read, row.written) < 3e-5


def test_every_family_is_in_the_table():
    text = sections(PAGE.read_text())[TITLE]
    rows = {line.split("|")[1].strip() for line in text.splitlines() if "|" in line}
    assert set(FAMILIES) <= rows and len(FAMILIES) >= 20
