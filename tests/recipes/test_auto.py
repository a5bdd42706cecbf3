"""`fit: auto`: what a recipe becomes that leaves its router open, by what it says alone."""

from __future__ import annotations

from typing import Any

import pytest

from modekit.errors import RecipeError
from modekit.recipes.choices import choices, why_chosen
from modekit.recipes.read import parse_recipe
from modekit.recipes.recipe import Recipe

TOKENS, PAIRS = {"fit": "lexical"}, {"fit": "lexical", "orders": [1, 2]}
LOGISTIC = {"fit": "logistic"}
NATIVE, MODEKIT = {"format": "plain"}, {"format": "modekit"}


def recipe(kind: str, text: bool | str, mixture: dict[str, Any], output: dict[str, Any]) -> Recipe:
    said: dict[str, Any] = {"prompts": [text]} if isinstance(text, str) else {"text": "./a.jsonl"} if text else {}
    experts = [{"name": name, kind: f"./{name}", **said} for name in ("law", "code")]
    return parse_recipe({"base_model": "./base", "experts": experts, "mixture": mixture, "output": output})


CASES: dict[str, tuple[str, bool | str, dict[str, Any], dict[str, Any], list[dict[str, Any]]]] = {
    "text": ("model", True, {}, {}, [TOKENS, PAIRS, LOGISTIC]),
    "text, said": ("model", True, {"router": {"fit": "auto"}}, {}, [TOKENS, PAIRS, LOGISTIC]),
    "text, native": ("model", True, {}, NATIVE, [TOKENS, LOGISTIC]),
    "text, channels": ("model", True, {}, {**NATIVE, "channels": 64}, [TOKENS]),
    "text, whole models": ("model", True, {"modules": "all"}, {}, [PAIRS]),
    "text, unseen decay": ("adapter", True, {"router": {"decay": [0.9]}}, {}, [TOKENS, PAIRS]),
    "text, context": ("adapter", True, {"router": {"granularity": "context"}}, {}, [LOGISTIC]),
    "text, tokens of a linear fit": ("model", True, {"router": {"tokens_per_domain": 99}}, {}, [LOGISTIC]),
    "prompts": ("model", "court", {}, {}, [LOGISTIC, {**LOGISTIC, "granularity": "context"}, PAIRS]),
    "prompts, whole models": ("model", "court", {"modules": "all"}, {}, [PAIRS]),
    "prompts, a rank": ("model", "court", {}, {**NATIVE, "rank": 8}, [TOKENS]),
    "adapters": ("adapter", False, {}, {}, [{"fit": "arrow", "granularity": "context"}, {}, {"fit": "random"}]),
    "models": ("model", False, {"backbone": "average"}, {}, [{}, {"fit": "random"}]),
    "models that are routed": ("model", False, {"method": "routing"}, {}, [{"fit": "random"}]),
    "models, one of them": ("model", False, {"top_k": 1}, {}, [{"fit": "random"}]),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_a_recipe_may_become_the_best_first(case: tuple[str, bool | str, Any, Any, list[dict[str, Any]]]) -> None:
    *said, expected = case
    said_settings = {key: value for key, value in said[2].get("router", {}).items() if key != "fit"}
    found = [settled.mixture for settled, _ in choices(recipe(*said))]
    routers = [mixture.router.model_dump(exclude_unset=True) for mixture in found]
    assert routers == [{**router, **said_settings} if router else {} for router in expected]
    assert [mixture.method for mixture in found] == ["routing" if router else "linear" for router in expected]
    assert all(mixture.backbone == said[2].get("backbone", "base") for mixture in found)


def test_a_router_is_left_open_by_default_and_without_effect_on_fixed_weights() -> None:
    assert recipe("model", True, {}, {}).mixture.is_open
    assert not recipe("model", True, {"method": "linear"}, {}).mixture.is_open


@pytest.mark.parametrize(
    ("mixture", "said"),
    [
        ({"router": {"l2": 0.1, "orders": [1, 2]}}, "'l2' has no effect"),
        ({"modules": "all", "router": {"granularity": "context"}}, "granularity"),
    ],
)
def test_settings_that_no_choice_takes_are_refused_with_their_names(mixture: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        recipe("model", True, mixture, {})


def test_text_of_some_experts_alone_is_refused() -> None:
    experts = [{"name": "law", "model": "./law", "text": "./a.jsonl"}, {"name": "code", "model": "./code"}]
    with pytest.raises(RecipeError, match="missing: code"):
        parse_recipe({"base_model": "./base", "experts": experts})


@pytest.mark.parametrize(
    ("mixture", "native", "text", "said"),
    [
        ({"top_k": 1, "router": TOKENS}, True, True, "a plain checkpoint"),
        ({"router": TOKENS}, True, True, ""),
        ({"top_k": 1, "router": TOKENS}, False, True, ""),
        ({"router": {**LOGISTIC, "granularity": "context"}}, False, True, "logistic"),
        ({"top_k": 1, "router": PAIRS}, False, True, "the modekit architecture"),
        ({"router": LOGISTIC}, True, True, "logistic"),
        ({"top_k": 1, "router": {**PAIRS, "buckets": 512}}, False, True, "the modekit architecture"),
        ({"method": "linear"}, True, False, "none (fixed weights)"),
        ({"method": "linear"}, True, True, ""),
        ({"router": {"fit": "random"}}, True, False, "random"),
    ],
)
def test_why_is_said_of_what_would_be_chosen_alone(mixture: dict[str, Any], native: bool, text: bool, said: str) -> None:
    why = why_chosen(recipe("model", text, mixture, {}), plain=native)
    assert said in why and bool(said) == bool(why)
