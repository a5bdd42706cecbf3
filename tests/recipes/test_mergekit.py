"""A recipe of mergekit is recognised, and the recipe that it becomes is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from modekit.errors import RecipeError
from modekit.recipes.read import load_recipe, parse_recipe
from modekit.recipes.recipe import Recipe

MOE: dict[str, Any] = {
    "base_model": "org/base",
    "gate_mode": "hidden",
    "dtype": "bfloat16",
    "experts_per_token": 2,
    "experts": [
        {"source_model": "org/law-7b", "positive_prompts": ["What is a tort?"], "negative_prompts": ["def f():"]},
        {"source_model": "other/law-7b", "positive_prompts": ["Write Python."]},
        {"source_model": "org/base", "positive_prompts": ["Hello"]},
    ],
}
MERGE: dict[str, Any] = {
    "merge_method": "ties",
    "base_model": "org/base",
    "dtype": "float16",
    "models": [
        {"model": "org/base"},
        {"model": "org/law", "parameters": {"weight": 0.4, "density": 0.5}},
        {"model": "org/code", "parameters": {"weight": 0.6}},
    ],
}


def becomes(path: Path, recipe: dict[str, Any]) -> Recipe:
    """Of mergekit's recipe, the one that the message shows, pasted."""
    path.write_text(yaml.safe_dump(recipe))
    with pytest.raises(RecipeError, match="this is a recipe of mergekit") as caught:
        load_recipe(path)
    shown = str(caught.value.remedy).partition("\n\n")[2]
    path.write_text(shown)
    return load_recipe(path)


def test_the_command_that_mixes_the_same_models_is_named(tmp_path: Path) -> None:
    (tmp_path / "moe.yaml").write_text(yaml.safe_dump(MOE))
    with pytest.raises(RecipeError, match="`modekit mix org/base law-7b=org/law-7b law-7b-2=other/law-7b -o OUT`"):
        load_recipe(tmp_path / "moe.yaml")


def test_a_mixture_keeps_its_prompts(tmp_path: Path) -> None:
    made = becomes(tmp_path / "moe.yaml", MOE)
    assert made.names == ["law-7b", "law-7b-2", "general"]
    assert [expert.source for expert in made.experts] == ["org/law-7b", "other/law-7b", "base"]
    assert made.experts[0].prompts == ["What is a tort?"] and made.experts[0].negative_prompts == ["def f():"]
    assert (made.mixture.router.fit, made.top_k, made.output.dtype) == ("centroid", 2, "bfloat16")


@pytest.mark.parametrize(("mode", "fit"), [("cheap_embed", "lexical"), ("random", "random"), ("uniform_random", "random")])
def test_every_mode_of_a_gate_has_a_fit(tmp_path: Path, mode: str, fit: str) -> None:
    assert becomes(tmp_path / "moe.yaml", {**MOE, "gate_mode": mode}).mixture.router.fit == fit


def test_a_merge_becomes_fixed_weights(tmp_path: Path) -> None:
    made = becomes(tmp_path / "merge.yaml", MERGE)
    assert (
        made.names == ["law", "code"] and made.mixture.method == "linear" and made.mixture.weights == {"law": 0.4, "code": 0.6}
    )
    assert made.mixture.backbone == "ties" and made.base_model == "org/base"


@pytest.mark.parametrize(
    "recipe", [{"merge_method": 3}, {**MOE, "experts_per_token": "many"}, {**MERGE, "models": [1, {"model": [2]}]}]
)
def test_one_that_cannot_be_said_shows_no_recipe(tmp_path: Path, recipe: dict[str, Any]) -> None:
    (tmp_path / "odd.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(RecipeError, match="recipe of mergekit") as caught:
        load_recipe(tmp_path / "odd.yaml")
    assert caught.value.remedy == "write it as docs/recipe.md shows"


def test_modekits_own_is_none_of_mergekit() -> None:
    made = parse_recipe(
        {"base_model": "b", "experts": [{"name": "law", "model": "x"}], "mixture": {"router": {"fit": "random"}}}
    )
    assert made.names == ["law"]
