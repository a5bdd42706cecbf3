"""The search: what it scores is what it builds, and what chose is never what is reported."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace as Some
from typing import Any

import pytest

from command_line import ended
from conftest import DOMAINS, Workshop, make_workshop
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.checkpoint import open_checkpoint
from modekit.cli.words import said_in
from modekit.errors import ModekitError, OutputError, TextError, TuneError
from modekit.evaluation.domains import held_out_domains, held_out_texts
from modekit.evaluation.evaluate import evaluate
from modekit.evaluation.loss import score_domain
from modekit.loaded.load import load_model
from modekit.planning.make import make_plan
from modekit.recipes.read import load_recipe
from modekit.recipes.recipe import Recipe
from modekit.search.results import Candidate, TuneResults, ranked
from modekit.search.tune import tune
from modekit.search.variants import OWN, variants_of
from modekit.text.splits import digests_in, mark_of

FIT = {"tokens_per_domain": 400, "keep_tokens": 64, "sequence_length": 32}
CENTROID = {"method": "routing", "top_k": 2, "router": {**FIT, "fit": "centroid"}}
FEW: dict[str, Any] = {"tokens_per_domain": 300, "sequence_length": 32}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    made = make_workshop(tmp_path_factory.mktemp("tune"))
    made.recipe["mixture"] = CENTROID
    return made


def recipe_of(shop: Workshop, **changes: Any) -> Recipe:
    return load_recipe(shop.write(**changes))


@pytest.fixture(scope="module")
def tuned(shop: Workshop) -> tuple[Path, TuneResults]:
    out = shop.root / "TUNED"
    return out, tune(recipe_of(shop), shop.root, out, **FEW)


def test_the_best_is_built_and_has_the_loss_that_was_found(tuned: tuple[Path, TuneResults]) -> None:
    out, results = tuned
    checkpoint = open_checkpoint(out)
    assert is_proven(verify(checkpoint)) and results.recipe_digest == checkpoint.record.recipe_digest
    assert results.best.mean_loss == min(each.mean_loss for each in results.candidates if each.mean_loss is not None)
    model = load_model(out)
    for domain in held_out_domains(checkpoint, split="select", **FEW):
        assert score_domain(model, domain, lambda _: None).loss == pytest.approx(results.best.losses[domain.name], abs=1e-5)
    assert TuneResults.from_data(json.loads((out / "results" / "tune.json").read_text())).as_data() == results.as_data()
    assert results.best.name in (out / "results" / "tune.md").read_text()
    assert make_plan(load_recipe(out / "recipe.yaml"), out).recipe.mixture == checkpoint.record.recipe.mixture
    assert not out.with_name("TUNED.tuning").exists()


def test_fixed_variants_are_tried_and_the_impossible_is_named(tuned: tuple[Path, TuneResults]) -> None:
    found = {each.name: each for each in tuned[1].candidates}
    assert {OWN, "lexical", "logistic", "linear (no gate)", "noisy"} <= {name for name, each in found.items() if each.losses}
    assert found["arrow"].why and not found["arrow"].losses and "arrow left out" in tuned[1].markdown()


@pytest.mark.parametrize("own", [CENTROID, {"method": "linear", "weights": {"medicine": 3.0, "law": 1.0, "code": 1.0}}])
def test_a_refit_variant_has_the_loss_of_its_own_build(shop: Workshop, tmp_path: Path, own: dict[str, Any]) -> None:
    recipe, axes = recipe_of(shop, mixture=own), {"backbone": ["base", "average"]}
    found = tune(recipe, shop.root, tmp_path / "ALL", axes=axes, **FEW)
    for name, mixture in variants_of(recipe, axes).items():
        alone = recipe_of(shop, mixture=mixture)
        built = tune(alone, shop.root, tmp_path / name.replace(" ", "-"), axes={"top_k": [99]}, **FEW).best
        assert built.losses == pytest.approx(next(each for each in found.candidates if each.name == name).losses, abs=1e-5)


def test_what_chose_is_never_reported(shop: Workshop, tmp_path: Path) -> None:
    """Even when the recipe's `eval` names the very text that the experts have."""
    recipe = recipe_of(shop, eval={name: f"./text/{name}.jsonl" for name in DOMAINS})
    tune(recipe, shop.root, tmp_path / "OUT", axes={"top_k": [1]}, **FEW)
    checkpoint = open_checkpoint(tmp_path / "OUT")
    chosen = set(digests_in(tmp_path / "OUT" / "selected-by.txt"))
    shown = {mark_of(document) for held in held_out_texts(checkpoint) for document in held.documents}
    assert chosen and shown and not chosen & shown
    assert evaluate(checkpoint, tokens_per_domain=200, sequence_length=32).row("mixture").scores


def test_axes_as_they_are_typed(shop: Workshop) -> None:
    axes = said_in(["top_k=1,2", "backbone=base,{method: ties, scale: 0.5}"], "tune", lists=True)
    assert axes == {"top_k": [1, 2], "backbone": ["base", {"method": "ties", "scale": 0.5}]}
    found = variants_of(recipe_of(shop), axes)
    assert len(found) == 5 and found["top_k 1, backbone base"]["top_k"] == 1
    with pytest.raises(TuneError, match="no value to try"):
        variants_of(recipe_of(shop), {"top_k": []})


def test_the_front_of_loss_against_size() -> None:
    def of(name: str, loss: float | None, active: int) -> Candidate:
        return Candidate(name=name, mixture={}, losses={} if loss is None else {"law": loss}, active=active)

    found = ranked([of("a", 3.0, 20), of("b", 2.0, 30), of("c", 3.5, 20), of("d", 3.2, 10), of("e", None, 0)])
    assert [(each.name, each.best, each.pareto) for each in found] == [
        ("b", True, True),
        ("a", False, True),
        ("d", False, True),
        ("c", False, False),
        ("e", False, False),
    ]


def test_refusals(shop: Workshop, tuned: tuple[Path, TuneResults], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(shop)
    with pytest.raises(OutputError, match="exists"):
        tune(recipe, shop.root, tuned[0], **FEW)
    (tmp_path / "NEW.tuning").mkdir()
    (tmp_path / "NEW.tuning" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="in the way"):
        tune(recipe, shop.root, tmp_path / "NEW", **FEW)
    silent = recipe_of(shop, experts=[{"name": n, "model": f"./{n}"} for n in DOMAINS], mixture={"method": "linear"})
    with pytest.raises(TextError, match="no text to choose by"):
        tune(silent, shop.root, tmp_path / "SILENT", axes={"top_k": [1]}, **FEW)
    (shop.root / "text" / "short.jsonl").write_text(json.dumps({"text": "one document only"}) + "\n")
    experts = [{**each, "text": "./text/short.jsonl"} for each in shop.recipe["experts"]]
    with pytest.raises(ModekitError, match=r"no text|no document|no held-out document"):
        tune(recipe_of(shop, experts=experts), shop.root, tmp_path / "SHORT", axes={"top_k": [1]}, **FEW)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModekitError, match="a package is not installed"):
        tune(recipe, shop.root, tmp_path / "RAY", ray=True, **FEW)


def test_a_loss_that_is_no_number_stops_with_its_place(shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modekit.search.tune.score_domain", lambda *_: Some(loss=float("nan")))
    with pytest.raises(TuneError, match="own, domain medicine"):
        tune(recipe_of(shop), shop.root, tmp_path / "NAN", **FEW)


def test_two_commands_do_not_share_a_search(shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def again(*_: Any) -> None:
        with pytest.raises(TuneError, match="another command is at this search"):
            tune(recipe_of(shop), shop.root, tmp_path / "SHARED", **FEW)
        raise KeyboardInterrupt

    monkeypatch.setattr("modekit.search.tune._here", again)
    with pytest.raises(KeyboardInterrupt):
        tune(recipe_of(shop), shop.root, tmp_path / "SHARED", **FEW)


def test_the_command(shop: Workshop, tmp_path: Path) -> None:
    words = ("tune", shop.write(), tmp_path / "OUT", "top_k=1,3", "--tokens", "300", "--sequence-length", "32")
    code, said, _ = ended(*words)
    assert code == 0 and "top_k 3" in said and OWN in said


@pytest.mark.ray
def test_ray_finds_what_this_process_finds(shop: Workshop, tmp_path: Path) -> None:
    here, there = (
        tune(recipe_of(shop), shop.root, tmp_path / f"OUT{ray}", axes={"top_k": [1, 9]}, ray=ray, **FEW)
        for ray in (False, True)
    )
    assert [(each.name, each.why) for each in here.candidates] == [(each.name, each.why) for each in there.candidates]
    for one, other in zip(here.candidates, there.candidates, strict=True):
        assert one.losses == pytest.approx(other.losses, abs=1e-4)
