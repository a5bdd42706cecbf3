"""The recipe: schema, defaults, sizes, digest. What is refused is in test_bad_recipe.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from modekit.errors import RecipeError
from modekit.recipes.backbone import BackboneMerge
from modekit.recipes.edit import as_written
from modekit.recipes.read import load_recipe, parse_recipe
from modekit.recipes.schema import SCHEMA_FILE, schema_text

RECIPE: dict[str, Any] = {
    "base_model": "./base",
    "experts": [{"name": "law", "model": "./law", "text": "law.txt"}, {"name": "rest", "model": "base", "text": ["a", "b"]}],
}


def test_the_shipped_schema_is_in_step() -> None:
    assert SCHEMA_FILE.read_text() == schema_text(), "run: python -m modekit.recipes"


def test_the_schema_accepts_what_the_recipe_accepts_and_refuses_a_misspelt_key() -> None:
    schema = json.loads(schema_text())
    full = {
        **RECIPE,
        "mixture": {"backbone": {"expert": "law"}, "router": {"fit": "logistic"}},
        "output": {"shard_size": "2GB"},
    }
    parse_recipe(full)
    jsonschema.validate(full, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**RECIPE, "mixture": {"rooter": {}}}, schema)


def test_silent_recipes_get_the_documented_defaults() -> None:
    recipe = parse_recipe(RECIPE)
    assert (recipe.mixture.method, recipe.top_k, recipe.mixture.router.fit) == ("routing", 2, "auto")
    assert recipe.mixture.backbone == "base" and recipe.output.dtype == "source"
    assert recipe.experts[0].text == ["law.txt"]


@pytest.mark.parametrize(
    ("size", "count"), [("5GB", 5 * 10**9), ("1.5 MiB", 1_572_864), (123, 123), ("200kB", 200_000), ("7B", 7)]
)
def test_sizes(size: object, count: int) -> None:
    assert parse_recipe({**RECIPE, "output": {"shard_size": size}}).output.shard_size == count


@pytest.mark.parametrize(("method", "top_k"), [("linear", 2), ("gating", 2), ("routing", 2)])
def test_top_k_follows_from_the_method(method: str, top_k: int) -> None:
    assert parse_recipe({**RECIPE, "mixture": {"method": method}}).top_k == top_k


def test_what_decides_how_many_experts_take_part_is_named() -> None:
    for mixture, chosen in (
        ({}, "top_k 2"),
        ({"top_k": 1}, "top_k 1"),
        ({"top_p": 0.7}, "top_p 0.7"),
        ({"groups": 2}, "groups 2"),
    ):
        assert parse_recipe({**RECIPE, "mixture": mixture}).chosen == chosen


def test_a_merge_by_name_is_the_merge_with_its_defaults() -> None:
    short = parse_recipe({**RECIPE, "mixture": {"backbone": "ties"}})
    assert short.mixture.merge == BackboneMerge(method="ties")
    assert parse_recipe({**RECIPE, "mixture": {"backbone": {"expert": "law"}}}).mixture.merge is None


def test_recipes_that_say_the_same_have_the_same_digest() -> None:
    spelled_out = {**RECIPE, "mixture": {"method": "routing", "router": {"temperature": 1}}, "output": {"shard_size": "5GB"}}
    assert parse_recipe(RECIPE).digest() == parse_recipe(spelled_out).digest()
    assert parse_recipe(RECIPE).digest() != parse_recipe({**RECIPE, "mixture": {"top_k": 1}}).digest()


def test_a_recipe_survives_its_own_json(tmp_path: Path) -> None:
    recipe = parse_recipe({**RECIPE, "mixture": {"backbone": {"method": "ties", "density": 0.5}}})
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True)))
    assert load_recipe(path) == recipe


@pytest.mark.parametrize("mixture", [{"top_k": True}, {"top_k": "1"}, {"router": {"seed": "7"}}, {"router": {"l2": "small"}}])
def test_a_value_of_another_type_is_not_bent_into_shape(mixture: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="mixture"):
        parse_recipe({**RECIPE, "mixture": mixture})


def recipe(law: list[str] | None = None, code: list[str] | None = None) -> dict[str, Any]:
    experts: list[dict[str, Any]] = [
        {"name": "law", "model": "./law", "text": "./law.txt", "labels": law},
        {"name": "code", "adapter": "./code", "labels": code},
    ]
    said = [{key: value for key, value in expert.items() if value is not None} for expert in experts]
    return {"base_model": "./base", "experts": said, "mixture": {"router": {"fit": "random"}}}


def test_a_label_leads_to_its_expert() -> None:
    read = parse_recipe(recipe(["court", "contracts"], ["python"]))
    assert read.other_labels == {"court": 0, "contracts": 0, "python": 1}
    assert parse_recipe(as_written(read)) == read


def test_recipes_without_labels_do_not_speak_of_them() -> None:
    assert "labels" not in str(parse_recipe(recipe()).model_dump(mode="json"))


@pytest.mark.parametrize(
    ("law", "code", "said"),
    [
        (["court"], ["court"], "the label 'court' is known already"),
        (["code"], None, "the label 'code' is known already"),
        (["court", "court"], None, "the label 'court' is known already"),
        (["law"], None, "the label 'law' is known already"),
        (None, ["base"], "the label 'base' is known already"),
        ([], None, "at least 1 item"),
    ],
)
def test_a_label_that_leads_nowhere_is_one_clear_error(law: list[str] | None, code: list[str] | None, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(recipe(law, code))
    assert said in str(caught.value) and str(caught.value).count("\n  - ") == 1
