"""Adapters of every family in transformers and here, both ways, run live."""

from pathlib import Path

import pytest
from compatibility import section
from families import FAMILIES
from families import exchange


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_of_a_family_go_both_ways(name, tmp_path):
    row = exchange(name, tmp_path)
    assert row.layers >= 6
    assert max(row.base, row.read, row.written) < 3e-5


def test_every_family_is_in_the_table():
    text = (Path(__file__).parents[1] / "docs" / "compatibility.md").read_text()
    rows = {
        line.split("|")[1].strip() for line in section(text).splitlines() if "|" in line
    }
    assert set(FAMILIES) <= rows and len(FAMILIES) >= 20
