"""Edits of recipes as plain data: what has no effect any more goes, what is asked for stays."""

from __future__ import annotations

from typing import Any

import pytest

from modekit.recipes.edit import as_written, changed_mixture, with_mixture
from modekit.recipes.fits import FITS
from modekit.recipes.read import parse_recipe

EXPERTS = [
    {"name": "law", "model": "./law", "text": ["a"], "negative_prompts": ["x"]},
    {"name": "rest", "model": "base", "text": ["b"]},
]
CENTROID = {"router": {"fit": "centroid"}}
RECIPE: dict[str, Any] = {"base_model": "./base", "experts": EXPERTS, "mixture": CENTROID}


def test_a_recipe_as_written_says_what_was_set_and_no_more() -> None:
    assert as_written(parse_recipe(RECIPE)) == RECIPE


@pytest.mark.parametrize("mixture", [{"method": "linear"}, {}, {"router": {"fit": "logistic"}}, {"router": {"fit": "random"}}])
def test_negative_prompts_stay_only_with_a_fit_that_reads_them(mixture: dict[str, Any]) -> None:
    assert with_mixture(RECIPE, CENTROID) == RECIPE
    changed = with_mixture(RECIPE, mixture)
    assert "negative_prompts" not in changed["experts"][0] and changed["mixture"] == mixture
    parse_recipe(changed)
    assert RECIPE["experts"][0]["negative_prompts"] == ["x"], "an edit leaves what it was given as it is"


ROUTER = {"fit": "logistic", "granularity": "context", "decay": [0.5], "l2": 0.1, "seed": 3, "per": "feature", "noise": 0.1}


@pytest.mark.parametrize(
    ("asked", "left"),
    [
        ({"fit": "logistic"}, {"granularity", "decay", "l2", "per", "noise"}),
        ({"fit": "random"}, {"granularity", "decay", "seed", "per", "noise"}),
        ({"fit": "arrow"}, {"granularity", "decay", "noise"}),
        ({"fit": "lexical", "orders": [1, 2], "buckets": 512}, {"noise", "orders", "buckets", "seed"}),
        ({"granularity": "token"}, {"granularity", "l2", "per", "noise"}),
        (
            {"fit": "lexical", "orders": [1, 2], "buckets": 512, "per": "feature", "l2": 1.0, "decay": [0.9]},
            {"per", "l2", "decay", "noise", "orders", "buckets", "seed"},
        ),
    ],
)
def test_a_router_keeps_what_its_fit_reads_and_what_is_asked_for(asked: dict[str, Any], left: set[str]) -> None:
    router = changed_mixture({"router": ROUTER}, {"router": asked})["router"]
    assert router.keys() - {"fit"} == left
    assert router.items() >= asked.items()


def test_a_decay_of_evidence_is_none_of_averages() -> None:
    back = changed_mixture(
        {"router": {"fit": "lexical", "orders": [1, 2], "buckets": 512, "decay": [0.5]}},
        {"router": {"fit": "logistic", "granularity": "context"}},
    )
    assert back == {"router": {"fit": "logistic", "granularity": "context"}}


@pytest.mark.parametrize(
    ("mixture", "changes", "expected"),
    [
        ({"top_k": 1}, {"method": "gating"}, {"method": "gating"}),
        ({"top_p": 0.5}, {"top_k": 1}, {"top_k": 1}),
        ({"top_k": 1}, {"top_p": 0.5}, {"top_p": 0.5}),
        ({"weights": {"law": 1.0}, "method": "linear"}, {"method": "routing"}, {"method": "routing"}),
        ({"always_on": {"expert": "law"}}, {"method": "gating"}, {"method": "gating"}),
        ({"always_on": {"expert": "law", "weight": 0.5}}, {"method": "linear"}, {"method": "linear"}),
        ({"router": {"fit": "logistic"}}, {"method": "linear"}, {"method": "linear"}),
        (
            {"router": {"fit": "logistic"}},
            {"method": "linear", "router": {"l2": 1.0}},
            {"method": "linear", "router": {"l2": 1.0}},
        ),
        (
            {"modules": "all", "router": {"fit": "lexical", "orders": [1, 2], "buckets": 512}},
            {"router": {"fit": "logistic"}},
            {"modules": "all", "router": {"fit": "logistic", "granularity": "sequence", "per": "model"}},
        ),
    ],
)
def test_a_mixture_keeps_what_its_method_reads(
    mixture: dict[str, Any], changes: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert changed_mixture(mixture, changes) == expected


@pytest.mark.parametrize("name", FITS)
def test_settings_with_effect_are_accepted(name: str) -> None:
    router = {
        **ROUTER,
        "fit": name,
        "temperature": 2.0,
        "tokens_per_domain": 100,
        "sequence_length": 16,
        "keep_tokens": 0,
        "jitter": 0.1,
        "buckets": 64,
        "prefix": 3,
        "compute_dtype": "bfloat16",
    }
    experts = [{"name": "law", "model": "./law", "as": "lora", "text": "a"}]
    left = changed_mixture({"router": router}, {})
    parse_recipe({"base_model": "./base", "experts": experts, "mixture": left})
