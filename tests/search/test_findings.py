"""Findings of advice about domains for which the base model stands."""

from __future__ import annotations

import numpy as np

from modekit.recipes.read import parse_recipe
from modekit.search.advise.findings import of_gains
from modekit.search.advise.gains import BASE_INDEX, BlockLosses, Gains


def losses(mean: float) -> BlockLosses:
    return BlockLosses(np.array([10 * mean] * 4), np.array([10.0] * 4))


def gains(general: float, medicine: float) -> Gains:
    """Losses on the text of medicine (0) and general (1), whose expert is the base."""
    base = {0: losses(3.9), 1: losses(general)}
    return Gains({BASE_INDEX: base, 0: {0: losses(3.0), 1: losses(medicine)}, 1: base}, {})


RECIPE = parse_recipe(
    {
        "base_model": "./base",
        "mixture": {"method": "linear"},
        "experts": [{"name": "medicine", "model": "./m"}, {"name": "general", "model": "base"}],
    }
)


def test_a_base_expert_that_another_beats_on_its_text_is_a_finding() -> None:
    (finding,) = of_gains(RECIPE, gains(3.6, 3.44), [0])
    assert (finding.level, finding.about) == ("warning", "general")
    assert "medicine is better" in finding.what and "0.160" in finding.found and finding.to_do


def test_a_base_expert_that_is_the_best_is_not() -> None:
    assert list(of_gains(RECIPE, gains(3.4, 3.44), [0])) == []
