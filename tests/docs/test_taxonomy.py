"""benchmarks/survey.md is what it says: every leaf has a part or a reason, parts are there, tests and measurements, too."""

from __future__ import annotations

import pytest

import taxonomy_table
from taxonomy_leaves import LEAVES, Command, Leaf, Recipe, Training

NAMES = [leaf.name for leaf in LEAVES]


@pytest.mark.parametrize("leaf", LEAVES, ids=NAMES)
def test_every_leaf_is_a_part_that_is_there_or_has_a_reason(leaf: Leaf) -> None:
    assert not taxonomy_table.problems_of(leaf)


def test_no_leaf_stands_twice() -> None:
    assert len(set(NAMES)) == len(NAMES)


def test_the_page_is_up_to_date() -> None:
    written = taxonomy_table.PAGE.read_text(encoding="utf-8")
    assert written == taxonomy_table.page(), "run python scripts/taxonomy_table.py"


@pytest.mark.parametrize(
    "leaf",
    [
        Leaf("g", "no paper", (), note="why"),
        Leaf("g", "no number", ("Switch 2021",), note="why"),
        Leaf("g", "neither", ("Switch 2101.03961",)),
        Leaf("g", "no test", ("Switch 2101.03961",), Command("modekit inspect OUT")),
        Leaf("g", "no function", ("Switch 2101.03961",), None, "docs/test_taxonomy.py::test_nothing", note="why"),
        Leaf("g", "no key", ("Switch 2101.03961",), Recipe("mixture: {topk: 2}"), note="why"),
        Leaf("g", "no loss", ("Switch 2101.03961",), Training("losses: {balanced: 1}"), note="why"),
        Leaf("g", "no command", ("Switch 2101.03961",), Command("modekit inspects OUT"), note="why"),
        Leaf("g", "no option", ("Switch 2101.03961",), Command("modekit inspect OUT --layers 2"), note="why"),
        Leaf("g", "no row", ("Switch 2101.03961",), None, "", "no such row", note="why"),
    ],
    ids=lambda leaf: leaf.name,
)
def test_what_is_wrong_is_found(leaf: Leaf) -> None:
    """Parts that are not there have no test either, which is said beside."""
    found = taxonomy_table.problems_of(leaf)
    expected = {"no key", "no loss", "no command", "no option"}
    assert len(found) == (2 if leaf.name in expected else 1), found
