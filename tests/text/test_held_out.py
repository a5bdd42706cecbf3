"""Which text may be read: every row of the table in text/held_out.py, on texts that overlap as badly as they can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modekit.recipes.recipe import Recipe
from modekit.text.document import text_of
from modekit.text.held_out import RecipeTexts, fit_documents, read_text
from modekit.text.splits import SELECTED_FILE, TRAINED_FILE, Split, digest_of, mark_of, split_of
from text_files import write_records

LAW, OTHER = ([f"{name} number {place}" for place in range(200)] for name in ("law", "other"))


def recipe_of(tmp_path: Path, **law: Any) -> Recipe:
    """Two experts; `law` says what the first has, `eval` among it."""
    given = {"eval": law.pop("eval")} if "eval" in law else {}
    code = write_records(tmp_path / "code.jsonl", (f"code {place}" for place in range(50)))
    experts = [
        {"name": "law", "model": "base", **law},
        {"name": "code", "model": "base", "text": code},
    ]
    return Recipe.model_validate({"base_model": "base", "experts": experts, "mixture": {"method": "linear"}, **given})


def of(documents: list[str], *splits: Split) -> set[str]:
    return {document for document in documents if split_of(document) in splits}


def shown(texts: RecipeTexts, name: str, seen: Any = ()) -> set[str]:
    return set(next(held.documents for held in texts.report(seen) if held.name == name))


def chosen(texts: RecipeTexts, file: str, root: Path) -> set[str]:
    """By what may choose among the documents of a text."""
    return {text_of(document) for document in texts.select_of(read_text([file], root=root, where="--text"))}


def test_of_the_experts_text_each_split_has_its_use(tmp_path: Path) -> None:
    law = write_records(tmp_path / "law.jsonl", LAW)
    recipe = recipe_of(tmp_path, text=law, prompts=["a prompt"])
    texts = RecipeTexts(recipe, tmp_path)
    assert set(texts.fit(0)) == {"a prompt", *of(LAW, "fit")} == set(fit_documents(recipe.experts[0], tmp_path, 0))
    assert chosen(texts, law, tmp_path) == of(LAW, "select")
    assert shown(texts, "law") == of(LAW, "report")


def test_what_eval_gives_is_shown_whole_and_the_own_text_chooses(tmp_path: Path) -> None:
    law, other = write_records(tmp_path / "law.jsonl", LAW), write_records(tmp_path / "other.jsonl", OTHER)
    texts = RecipeTexts(recipe_of(tmp_path, text=law, eval={"law": other}), tmp_path)
    assert chosen(texts, law, tmp_path) == of(LAW, "select")
    assert shown(texts, "law") == set(OTHER)


def test_where_only_eval_gives_text_what_chose_is_not_shown(tmp_path: Path) -> None:
    other = write_records(tmp_path / "other.jsonl", OTHER)
    texts = RecipeTexts(recipe_of(tmp_path, eval={"law": other}), tmp_path)
    assert chosen(texts, other, tmp_path) == of(OTHER, "select") and texts.fit(0) == []
    assert shown(texts, "law") == set(OTHER)  # nothing has been chosen yet
    assert shown(texts, "law", [digest_of(each) for each in chosen(texts, other, tmp_path)]) == of(OTHER, "fit", "report")
    (tmp_path / SELECTED_FILE).write_text("".join(f"{mark_of(each)}\n" for each in chosen(texts, other, tmp_path)))
    after = RecipeTexts(recipe_of(tmp_path, eval={"law": "./other.jsonl"}), tmp_path, mixture=tmp_path)
    assert shown(after, "law") == of(OTHER, "fit", "report") and chosen(after, other, tmp_path) == of(OTHER, "select")


def test_what_set_a_router_is_not_shown_whatever_file_names_it(tmp_path: Path) -> None:
    """Also under another domain's name, and also a single prompt, for or against."""
    held_out = sorted(of(LAW, "select", "report"))
    prompts, against = held_out[:2], held_out[2:4]
    law = write_records(tmp_path / "law.jsonl", LAW)
    recipe = recipe_of(tmp_path, text=law, eval={"law": law, "poetry": law})
    experts = [recipe.experts[0].model_copy(update={"prompts": prompts, "negative_prompts": against}), recipe.experts[1]]
    texts = RecipeTexts(recipe.model_copy(update={"experts": experts}), tmp_path)
    assert shown(texts, "law") == shown(texts, "poetry") == set(held_out) - {*prompts, *against}
    assert chosen(texts, law, tmp_path) == of(LAW, "select") - {*prompts, *against}


def test_what_trained_a_model_neither_chooses_nor_is_shown(tmp_path: Path) -> None:
    law = write_records(tmp_path / "law.jsonl", LAW)
    recipe = recipe_of(tmp_path, text=law)
    select, report = sorted(of(LAW, "select"))[0], sorted(of(LAW, "report"))[0]
    for name in ("model", "mixture"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / TRAINED_FILE).write_text(f"{mark_of(select)}\n{digest_of(report)}\n")
        texts = RecipeTexts(recipe, tmp_path, **({"models": [folder]} if name == "model" else {"mixture": folder}))
        assert chosen(texts, law, tmp_path) == of(LAW, "select") - {select}
        assert shown(texts, "law") == of(LAW, "report") - {report}


def test_another_text_that_is_given_by_command_obeys_the_same_rule(tmp_path: Path) -> None:
    prompt = sorted(of(OTHER, "select"))[0]
    recipe = recipe_of(tmp_path, text=write_records(tmp_path / "law.jsonl", LAW), prompts=[prompt])
    given = read_text([write_records(tmp_path / "other.jsonl", OTHER)], root=tmp_path, where="--text")
    assert set(RecipeTexts(recipe, tmp_path).select_of(given)) == of(OTHER, "select") - {prompt}
    assert set(given.split("fit")) == of(OTHER, "fit") and set(given.split("report")) == of(OTHER, "report")


def test_each_text_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import modekit.text.held_out as module

    read: list[str] = []
    real = module.read_documents
    monkeypatch.setattr(module, "read_documents", lambda *a, **k: (read.append(k["where"]), real(*a, **k))[1])
    law = write_records(tmp_path / "law.jsonl", LAW)
    texts = RecipeTexts(recipe_of(tmp_path, text=law, eval={"law": law}), tmp_path)
    texts.own(0), texts.report(), texts.fit(0), texts.report()
    assert sorted(read) == ["eval.law", "experts[0] 'law': text", "experts[1] 'code': text"]
