"""What `import modekit` offers, pinned: names, signatures, and that nothing heavy is imported for it."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import shutil
from pathlib import Path

import pytest
import torch

import modekit
from conftest import Workshop
from refusal import borrow, run_python

VERBS = ("add", "build", "evaluate", "fit", "load", "plan", "recipe", "remove", "router", "train", "verify")


def test_the_names_are_these() -> None:
    assert sorted(modekit.__all__) == sorted([*VERBS, "ModekitError", "Run"])


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_a_documented_function(verb: str) -> None:
    function = getattr(modekit, verb)
    assert inspect.isfunction(function)
    assert (inspect.getdoc(function) or "").strip()
    page = (Path(__file__).parents[2] / "docs/python.md").read_text()
    assert f"`modekit.{verb}(" in page


def test_no_room_takes_a_verbs_name() -> None:
    for module in pkgutil.walk_packages(modekit.__path__, "modekit."):
        if module.name.count(".") == 1 and module.name != "modekit.__main__":
            importlib.import_module(module.name)
    assert all(inspect.isfunction(getattr(modekit, verb)) for verb in VERBS)


def test_the_import_and_a_plan_stay_light(shared_workshop: Workshop, tmp_path: Path) -> None:
    bench = borrow(shared_workshop, tmp_path)
    code = "import sys, modekit; p = modekit.plan(sys.argv[1]); assert 'torch' not in sys.modules; print(len(p.recipe.experts))"
    done = run_python(code, bench.write())
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "3"


def test_from_a_mapping_to_a_model(shared_workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = borrow(shared_workshop, tmp_path)
    monkeypatch.chdir(tmp_path)
    recipe = modekit.recipe(bench.recipe)
    checkpoint = modekit.build(recipe, "OUT")
    assert all(check.verdict == "proven" for check in modekit.verify("OUT"))
    assert modekit.fit(checkpoint, fit="random", seed=3).record.recipe.mixture.router.seed == 3
    assert modekit.fit("OUT", top_k=1).record.recipe.top_k == 1
    model, tokenizer = modekit.load("OUT")
    with torch.inference_mode():
        logits = model(**tokenizer("a dose", return_tensors="pt")).logits
    assert torch.isfinite(logits).all()
    assert {row.name for row in modekit.evaluate("OUT", tokens=200).rows} >= {"base", "oracle", "mixture"}


def test_a_recipe_that_is_read_names_the_models_beside_its_file(
    small_workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the current folder has others of the same names."""
    shutil.copytree(small_workshop.root, tmp_path / "sub")
    bench = Workshop(tmp_path / "sub", small_workshop.recipe)
    for name in ("base", "medicine", "law", "code", "sub/own"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    file = os.path.relpath(bench.write())
    own = tmp_path / "sub" / "own"
    plans = [modekit.plan(file), modekit.plan(modekit.recipe(file)), modekit.plan(modekit.recipe(file, root=own), root=own)]
    folders = [[source.folder for source in plan.sources] for plan in plans]
    assert folders == [[tmp_path / "sub" / name for name in ("base", "medicine", "law", "code")]] * 3
    monkeypatch.chdir(tmp_path / "sub")
    assert modekit.plan(modekit.recipe("recipe.yaml")).recipe.digest() == plans[0].recipe.digest()


def test_a_path_through_a_link_is_the_folder_that_it_leads_to(
    small_workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the record says relative to the mixture is found from there, however the mixture was named."""
    bench = borrow(small_workshop, tmp_path)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er")
    checkpoint = modekit.build(modekit.recipe(bench.recipe), tmp_path / "link" / "OUT")
    assert checkpoint.folder == tmp_path / "deep" / "er" / "OUT"
    sources = [checkpoint.source_folder(source) for source in checkpoint.record.sources]
    assert sources[0] == small_workshop.root / "base" and all(folder.is_dir() for folder in sources)
    added = modekit.add(
        modekit.remove(checkpoint, "code", out=tmp_path / "link" / "LESS"),
        bench.recipe["experts"][2],
        out=tmp_path / "link" / "MORE",
    )
    for each in (added, modekit.train(added, steps=1, what=["head"], out=tmp_path / "link" / "T").checkpoint):
        assert all(each.source_folder(source).is_dir() for source in each.record.sources)


def test_a_mixture_that_is_named_by_a_link_keeps_its_mark(small_workshop: Workshop, tmp_path: Path) -> None:
    """The mark lists what is modekit's own: else the next build over it would refuse."""
    bench = borrow(small_workshop, tmp_path)
    plan = modekit.plan(bench.recipe, root=tmp_path)
    modekit.build(plan, tmp_path / "OUT")
    (tmp_path / "link").symlink_to(tmp_path / "OUT")
    assert modekit.fit(tmp_path / "link", fit="random", seed=7).folder == tmp_path / "OUT"
    assert modekit.build(plan, tmp_path / "OUT", overwrite=True).record.recipe.mixture.router.seed == 1
