"""Other labels of an expert: which are taken, whose text they are, and that recipes without them stay what they were."""

from __future__ import annotations

from typing import Any

import pytest

from modekit.errors import RecipeError
from modekit.recipes.edit import as_written
from modekit.recipes.read import parse_recipe


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
