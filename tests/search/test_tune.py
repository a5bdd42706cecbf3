"""The search: what it scores is what a build gives, nothing is made twice, and what chose is never what is reported."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
import yaml

import modekit.search.tune.study as study_module
from adapter_folders import UP, lora, write_adapter
from command_line import ended
from conftest import DOMAINS, Workshop, logits_of, make_workshop, save, tiny_model, write_text
from kills import KILLED
from modekit.building.build import build
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.checkpoint import open_checkpoint
from modekit.errors import ModekitError, OutputError, RecipeError, TextError, TuneError
from modekit.evaluation.domains import held_out_domains, held_out_texts
from modekit.evaluation.evaluate import evaluate
from modekit.evaluation.loss import score_domain
from modekit.files.staging import Staging
from modekit.loaded.load import load_model
from modekit.planning.make import make_plan
from modekit.recipes.read import load_recipe
from modekit.recipes.recipe import Recipe
from modekit.search.tune.results import Candidate, TuneResults, TuneSettings, describe, gap_closed, pareto
from modekit.search.tune.selection import RUNGS, read_selections
from modekit.search.tune.shared_weights import SharedWeights, SwitchedModel
from modekit.search.tune.space import Space, backbones_differ, default_space, plain_recipe, read_space
from modekit.search.tune.study import candidate_recipe
from modekit.search.tune.tune import tune
from modekit.text.documents import read_documents
from modekit.text.splits import TRAINED_DIGITS, digest_of, mark_of, split_of
from refusal import without

FIT = {"tokens_per_domain": 400, "keep_tokens": 64, "sequence_length": 32}
RIDGE = {"method": "routing", "top_k": 2, "router": {**FIT, "fit": "ridge"}}
SETTINGS = TuneSettings(trials=14, tokens_per_domain=300, sequence_length=32)
SMALL = Space(
    router=["linear", "random", "ridge", "ngram"],
    top_k=[1, 2, 3],
    backbone=["base", "average"],
    decay=[0.9],
    order=[2],
    ngram_decay=[0.98],
    temperature=[0.5, 1.0],
    layers=[None],
    always_on=[None, 0.2],
)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Experts that differ everywhere, with enough text for three splits."""
    made = make_workshop(tmp_path_factory.mktemp("tune"))
    made.recipe["mixture"] = RIDGE
    return made


def recipe_of(shop: Workshop, **changes: Any) -> Recipe:
    return load_recipe(shop.write(**changes))


def tried(results: TuneResults) -> list[Candidate]:
    """In the order of the search, without what they are among the others."""
    return [Candidate.model_validate(dict(each)) for each in sorted(results.candidates, key=lambda each: each.number)]


MIXTURES: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear"},
    "noisy": {"method": "routing", "top_k": 1, "router": {"fit": "random", "seed": 3}},
    "ridge": RIDGE,
    "ridge, hot, average": {
        "method": "routing",
        "top_k": 3,
        "router": {**FIT, "fit": "ridge", "temperature": 0.5},
        "backbone": "average",
    },
    "ties": {"method": "routing", "top_k": 2, "router": {**FIT, "fit": "ridge"}, "backbone": {"method": "ties", "scale": 0.5}},
    "context": {**RIDGE, "router": {**FIT, "fit": "ridge", "granularity": "context", "decay": [0.9]}},
    "ngram": {"method": "routing", "top_k": 2, "router": {"fit": "ngram", "buckets": 512}},
    "classifier, hot": {"method": "routing", "top_k": 2, "router": {"fit": "classifier", "temperature": 0.5}},
    "classifier of hidden states": {
        "method": "routing",
        "top_k": 2,
        "router": {**FIT, "fit": "classifier", "features": "hidden", "prefix": 9},
    },
    "upper layers": {**RIDGE, "layers": ["1-2"]},
    "always on": {**RIDGE, "always_on": {"expert": "base", "weight": 0.2}},
    "whole": {"method": "routing", "top_k": 2, "modules": "all", "router": {"fit": "ngram", "buckets": 512}},
}


def test_what_is_scored_is_what_is_built(shop: Workshop, tmp_path: Path, ids: torch.Tensor) -> None:
    """One model that becomes every mixture in turn gives the logits of each one's own build."""
    recipe = recipe_of(shop)
    weights, switched = SharedWeights(tmp_path / "work", shop.root, averages=[None, 0.9]), SwitchedModel()
    (tmp_path / "work").mkdir()
    for name, mixture in [*MIXTURES.items(), *reversed(MIXTURES.items())]:
        candidate = candidate_recipe(recipe, mixture)
        shared = weights.checkpoint(weights.plan(candidate))
        logits = logits_of(switched.put(shared, weights.gates(shared, candidate)), ids)
        built = tmp_path / name
        if not built.exists():
            build(make_plan(candidate, shop.root), built)
        assert torch.allclose(logits, logits_of(built, ids), atol=1e-5), name
    assert switched.loads < 2 * len(MIXTURES) - 4  # those that differ in backbone and router alone load nothing anew


def test_shared_weights_share_their_bytes(shop: Workshop, tmp_path: Path) -> None:
    recipe, weights, switched = recipe_of(shop), SharedWeights(tmp_path, shop.root), SwitchedModel()
    found = []
    for backbone in ("base", "average"):
        candidate = candidate_recipe(recipe, {"method": "linear", "backbone": backbone})
        found.append(weights.checkpoint(weights.plan(candidate)))
        switched.put(found[-1], weights.gates(found[-1], candidate))
    first, second = found
    assert first.folder != second.folder and switched.loads == 1
    for name, ref in first.tensors.items():
        if ".router." not in name:
            shared = ref.file.stat().st_ino == second.tensors[name].file.stat().st_ino
            assert shared == (".experts." in name), name
    again = weights.checkpoint(weights.plan(candidate_recipe(recipe, RIDGE)))
    assert again.folder == first.folder  # another router is no other weights


def test_text_is_read_once_for_all_granularities(shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import modekit.routing.read as read_module

    read: list[int] = []
    real = read_module.capture_domain
    monkeypatch.setattr(read_module, "capture_domain", lambda *a, **k: (read.append(1), real(*a, **k))[1])
    recipe, weights = recipe_of(shop), SharedWeights(tmp_path, shop.root, averages=[None, 0.8, 0.9])
    for name in ("ridge", "context", "always on"):
        candidate = candidate_recipe(recipe, MIXTURES[name])
        shared = weights.checkpoint(weights.plan(candidate))
        weights.gates(shared, candidate)
    assert len(read) == len(DOMAINS)


@pytest.fixture(scope="module")
def tuned(shop: Workshop) -> tuple[Path, Any]:
    out = shop.root / "TUNED"
    return out, tune(recipe_of(shop), shop.root, out, space=SMALL, settings=SETTINGS)


def test_the_best_is_built_and_proven(shop: Workshop, tuned: tuple[Path, Any]) -> None:
    out, results = tuned
    checkpoint = open_checkpoint(out)
    assert is_proven(verify(checkpoint))
    best = results.best
    assert best.mean == min(each.mean for each in results.candidates if each.status == "scored")
    model = load_model(out)
    sizes = {"tokens_per_domain": 300, "sequence_length": 32}
    select = read_selections(recipe_of(shop), shop.root, [shop.root / "base"], **sizes)["select"]
    for domain in select.domains:
        assert score_domain(model, domain, lambda _: None).loss == pytest.approx(best.losses[domain.name], abs=1e-5)


def test_its_recipe_builds_the_same_from_where_it_lies(tuned: tuple[Path, Any], tmp_path: Path) -> None:
    out, _ = tuned
    again = build(make_plan(load_recipe(out / "recipe.yaml"), out), tmp_path / "again")
    shards = {path.name: path.read_bytes() for path in out.glob("model-*-0*.safetensors")}
    assert shards == {path.name: path.read_bytes() for path in again.folder.glob("model-*-0*.safetensors")}
    for gate, wanted in zip(again.gates(), open_checkpoint(out).gates(), strict=True):
        np.testing.assert_allclose(gate, wanted, rtol=0, atol=1e-3 * abs(wanted).max())


def test_fixed_variants_are_reported_and_the_worse_dropped(tuned: tuple[Path, Any]) -> None:
    _, results = tuned
    named = {each.name: each for each in results.candidates if each.name}
    assert set(named) >= {"gate-less (linear)", "noisy", "ridge", "n-gram", "noisy, backbone average"}
    assert all(each.report is not None for each in named.values()) and results.best.report is not None
    assert any(each.status == "dropped" for each in results.candidates)
    ranked = [each.tokens for each in results.candidates]
    assert ranked == sorted(ranked, reverse=True)  # losses compare on the same text alone
    full = {each.tokens for each in results.candidates if each.status == "scored"}
    assert len(full) == 1 and all(each.tokens < min(full) for each in results.candidates if each.status == "dropped")


def test_what_is_written(tuned: tuple[Path, Any]) -> None:
    out, results = tuned
    assert TuneResults.model_validate_json((out / "results" / "tune.json").read_text()) == results
    assert len(results.candidates) == SETTINGS.trials and [each.best for each in results.candidates].count(True) == 1
    assert results.checkpoint["recipe_digest"] == open_checkpoint(out).record.recipe_digest
    best, report = results.best, results.best.report
    assert report is not None and report.mean_loss == pytest.approx(sum(report.losses.values()) / 3)
    assert best.gap_closed == gap_closed(best.losses, results.reference["select"])
    assert best.description in (out / "results" / "tune.md").read_text()
    assert not (out.with_name("TUNED.tuning") / "tensors").exists()


def test_what_chose_is_never_reported(shop: Workshop) -> None:
    """Even when the recipe's `eval` names the very text that the experts have."""
    texts = {name: f"./text/{name}.jsonl" for name in DOMAINS}
    recipe = recipe_of(shop, eval=texts)
    out = shop.root / "HONEST"
    tune(recipe, shop.root, out, space=SMALL.model_copy(update={"router": ["linear"]}), settings=SETTINGS)
    documents = {name: read_documents([text], root=shop.root, where=name) for name, text in texts.items()}
    texts = read_selections(recipe, shop.root, [shop.root / "base"], tokens_per_domain=10**6, sequence_length=64)
    select, report = texts["select"], texts["report"]
    chosen = {digest_of(d)[:TRAINED_DIGITS] for own in documents.values() for d in own if split_of(d) == "select"}
    assert set(select.digests) == chosen and not chosen & set(report.digests)
    shown = held_out_domains(open_checkpoint(out), tokens_per_domain=10**6, sequence_length=64)
    for domain in shown:
        assert domain.record.documents == len(documents[domain.name]) - len(
            [d for d in documents[domain.name] if split_of(d) == "select"]
        ) or domain.record.documents == len([d for d in documents[domain.name] if split_of(d) == "report"])
    evaluate(open_checkpoint(out), tokens_per_domain=200, sequence_length=32)


def with_eval(shop: Workshop, case: str) -> dict[str, Any]:
    """Changes to the recipe: text under `eval` beside the experts' own, in its place, the same, or none."""
    own = {name: f"./text/{name}.jsonl" for name in DOMAINS}
    other = write_text(shop.root / "other", documents=90)
    for name in DOMAINS:  # of the same words, but other documents
        other[name].write_text(other[name].read_text().replace('"text": "', '"text": "again '))
    eval_ = {"none": {}, "beside": {"law": "./other/law.jsonl", "poetry": "./other/code.jsonl"}, "the same": own}
    if case != "in place":
        return {"eval": eval_[case]} if eval_[case] else {}
    experts = [{key: value for key, value in each.items() if key != "text"} for each in shop.recipe["experts"]]
    return {"experts": experts, "eval": {name: f"./other/{name}.jsonl" for name in DOMAINS}, "mixture": {"method": "linear"}}


@pytest.mark.parametrize("case", ["none", "beside", "the same", "in place"])
def test_the_report_is_of_the_text_that_eval_scores(shop: Workshop, case: str) -> None:
    """Document for document and loss for loss, whichever text the recipe gives for a domain."""
    out = shop.root / f"REPORT-{case}"
    recipe = recipe_of(shop, **with_eval(shop, case))
    space = SMALL.model_copy(update={"router": ["linear"], "backbone": ["base"]})
    found = tune(recipe, shop.root, out, space=space, settings=SETTINGS)
    tuned = open_checkpoint(out)
    domains = held_out_domains(tuned, tokens_per_domain=SETTINGS.tokens_per_domain, sequence_length=SETTINGS.sequence_length)
    own = [domain for domain in domains if domain.expert is not None]
    assert found.text["report"] == {domain.name: domain.record for domain in own}
    results = evaluate(tuned, tokens_per_domain=SETTINGS.tokens_per_domain, sequence_length=SETTINGS.sequence_length)
    assert found.best.report is not None
    assert found.best.report.losses == pytest.approx(
        {name: results.row("mixture").scores[name].loss for name in DOMAINS}, abs=1e-5
    )
    for name in DOMAINS:
        assert found.reference["report"]["own"][name] == pytest.approx(results.row(name).scores[name].loss, abs=1e-5)
    sizes = {"tokens_per_domain": 300, "sequence_length": 32}
    chosen = read_selections(recipe, shop.root, [shop.root / "base"], **sizes)["select"]
    texts = {held.name: held for held in held_out_texts(tuned)}
    assert not set(chosen.digests) & {mark_of(document) for held in texts.values() for document in held.documents}
    if case == "beside":
        assert len(texts["law"].documents) == 90  # all of it: it neither set nor chose anything


def test_a_killed_search_goes_on(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, out = recipe_of(shop), shop.root / "KILLED"
    real, calls = study_module._Worker.try_one, [0]

    def killed(*arguments: Any) -> bool:
        calls[0] += 1
        if calls[0] == 5:
            monkeypatch.setattr(SwitchedModel, "put", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(study_module._Worker, "try_one", killed)
        patch.setattr(SwitchedModel, "put", SwitchedModel.put)
        with pytest.raises(KeyboardInterrupt):
            tune(recipe, shop.root, out, space=SMALL, settings=SETTINGS)
    monkeypatch.undo()
    assert not out.exists()
    scored: list[int] = []
    monkeypatch.setattr(study_module._Worker, "try_one", lambda *a: (scored.append(1), real(*a))[1])
    results = tune(recipe, shop.root, out, space=SMALL, settings=SETTINGS)
    assert len(results.candidates) == SETTINGS.trials
    assert len([each for each in results.candidates if each.name]) >= 5
    assert len(scored) >= SETTINGS.trials - 5  # the first four stand; the one that was cut short is tried again


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_kill_at_the_commit_leaves_all_or_nothing(shop: Workshop, moment: str) -> None:
    """What chose the mixture, its recipe and the results are there as soon as the folder is."""
    recipe = shop.write(mixture={"method": "linear"})
    out = shop.root / f"CUT-{moment}"
    commit = Staging.commit
    space = Space(router=["linear"], top_k=[1], backbone=["base"], layers=[None])

    def cut(stage: Staging) -> None:
        if moment == "after":
            commit(stage)
        os._exit(KILLED)

    forked = os.fork()
    if forked == 0:
        Staging.commit = cut  # type: ignore[method-assign]
        try:
            tune(load_recipe(recipe), shop.root, out, space=space, settings=TuneSettings(2, 300, 32))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]) == KILLED
    if moment == "before":
        assert not out.exists()
        tune(load_recipe(recipe), shop.root, out, space=space, settings=TuneSettings(2, 300, 32))
    assert is_proven(verify(open_checkpoint(out)))
    assert load_recipe(out / "recipe.yaml") and json.loads((out / "results" / "tune.json").read_text())["candidates"]
    assert (out / "selected-by.txt").read_text() and (out / "results" / "tune.md").exists()


def test_a_kill_before_the_search_has_said_whose_it_is_stops_nobody(shop: Workshop) -> None:
    (shop.root / "EARLY.tuning").mkdir()
    (shop.root / "EARLY.tuning" / ".modekit.0123456789abcdef.tmp").write_text("{")
    space = SMALL.model_copy(update={"router": ["linear"], "backbone": ["base"]})
    tune(recipe_of(shop, mixture={"method": "linear"}), shop.root, shop.root / "EARLY", space=space, settings=SETTINGS)


def test_a_search_leaves_the_loudness_of_other_libraries_alone(shop: Workshop) -> None:
    before = optuna.logging.get_verbosity(), logging.getLogger("optuna").level, list(warnings.filters)
    space = SMALL.model_copy(update={"router": ["linear"], "backbone": ["base"]})
    tune(recipe_of(shop, mixture={"method": "linear"}), shop.root, shop.root / "QUIET", space=space, settings=SETTINGS)
    assert (optuna.logging.get_verbosity(), logging.getLogger("optuna").level, list(warnings.filters)) == before


def test_an_unfinished_line_is_cut_off(shop: Workshop) -> None:
    """What a full disk leaves of the journal's last line does not end the search for good."""
    space, out = SMALL.model_copy(update={"router": ["linear", "random"]}), shop.root / "TORN"
    before = tune(recipe_of(shop), shop.root, out, space=space, settings=TuneSettings(4, 300, 32))
    with (shop.root / "TORN.tuning" / "study.log").open("ab") as log:
        log.write(b'{"op_code":4,"wor')
    after = tune(recipe_of(shop), shop.root, out, space=space, settings=TuneSettings(6, 300, 32), overwrite=True)
    assert tried(after)[: len(before.candidates)] == tried(before) and len(after.candidates) > len(before.candidates)


def test_a_process_that_dies_is_told(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    context = type(
        "Context",
        (),
        {
            "Process": lambda *_, **__: type(
                "Dead", (), {"start": lambda _: None, "join": lambda _: None, "terminate": lambda _: None, "exitcode": -9}
            )()
        },
    )
    monkeypatch.setattr("multiprocessing.get_context", lambda _: context())
    settings = TuneSettings(trials=4, tokens_per_domain=300, sequence_length=32, processes=2)
    space = SMALL.model_copy(update={"router": ["linear"]})
    with pytest.raises(TuneError, match="a process of the search ended early"):
        tune(recipe_of(shop), shop.root, shop.root / "DIED", space=space, settings=settings)


def test_negative_prompts_keep_statistics_of_their_own(shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Centroid and ridge in turn read the text twice, not every time."""
    import modekit.routing.read as read_module

    read: list[int] = []
    real = read_module.capture_domain
    monkeypatch.setattr(read_module, "capture_domain", lambda *a, **k: (read.append(1), real(*a, **k))[1])
    centroid = {**RIDGE, "router": {**FIT, "fit": "centroid"}}
    experts = [{**each, "negative_prompts": ["something else"]} for each in shop.recipe["experts"]]
    recipe = recipe_of(shop, experts=experts, mixture=centroid)
    for mixture in (centroid, RIDGE, centroid, RIDGE):
        candidate, weights = candidate_recipe(recipe, mixture), SharedWeights(tmp_path, shop.root, averages=[None])
        shared = weights.checkpoint(weights.plan(candidate))
        weights.gates(shared, candidate)
    assert len(read) == 2 * len(DOMAINS)


def test_more_trials_go_on_from_the_others(shop: Workshop, tuned: tuple[Path, Any]) -> None:
    _, before = tuned
    settings = TuneSettings(trials=17, tokens_per_domain=300, sequence_length=32)
    after = tune(recipe_of(shop), shop.root, shop.root / "TUNED", space=SMALL, settings=settings, overwrite=True)
    assert [each.mixture for each in tried(after)[:14]] == [each.mixture for each in tried(before)]
    assert len(after.candidates) == 17 and after.best.mean <= before.best.mean


def test_a_search_of_other_models_or_text_is_not_gone_on_with(tmp_path: Path) -> None:
    made = make_workshop(tmp_path)
    out, space = tmp_path / "OUT", SMALL.model_copy(update={"router": ["linear"], "backbone": ["base"]})
    tune(recipe_of(made), tmp_path, out, space=space, settings=SETTINGS)
    text = tmp_path / "text" / "law.jsonl"
    text.write_text(text.read_text() + json.dumps({"text": "one more document"}) + "\n")
    with pytest.raises(TuneError, match="other text"):
        tune(recipe_of(made), tmp_path, out, space=space, settings=SETTINGS, overwrite=True)
    save(tiny_model(seed=9), tmp_path / "law")
    with pytest.raises(TuneError, match="other models, text"):
        tune(recipe_of(made), tmp_path, out, space=space, settings=SETTINGS, overwrite=True)
    shutil.rmtree(tmp_path / "OUT.tuning")
    tune(recipe_of(made), tmp_path, out, space=space, settings=SETTINGS, overwrite=True)
    assert is_proven(verify(open_checkpoint(out)))  # the mixture of the new expert, not what was there


def test_a_search_of_adapters_with_another_scale_is_not_gone_on_with(tmp_path: Path) -> None:
    made = make_workshop(tmp_path)
    for seed, expert in enumerate(made.recipe["experts"]):
        shutil.rmtree(tmp_path / expert["name"])
        write_adapter(tmp_path / expert["name"], lora("mlp.up_proj", 48, 32, seed=seed), lora_alpha=8)
        expert["adapter"] = expert.pop("model")
    recipe, space = recipe_of(made), SMALL.model_copy(update={"router": ["linear"], "backbone": ["base"]})
    tune(recipe, tmp_path, tmp_path / "OUT", space=space, settings=SETTINGS)
    config = tmp_path / "law" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 64}))
    with pytest.raises(TuneError, match="other models"):
        tune(recipe, tmp_path, tmp_path / "OUT", space=space, settings=SETTINGS, overwrite=True)


def test_a_folder_of_others_is_refused_before_the_search(shop: Workshop) -> None:
    (shop.root / "THESIS").mkdir()
    (shop.root / "THESIS" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds something else"):
        tune(recipe_of(shop), shop.root, shop.root / "THESIS", space=SMALL, settings=SETTINGS, overwrite=True)
    assert not (shop.root / "THESIS.tuning").exists()


def test_prompts_that_set_routers_choose_nothing(shop: Workshop) -> None:
    documents = read_documents(["./text/law.jsonl"], root=shop.root, where="law")
    prompts = [each for each in documents if split_of(each) == "select"][:2]
    experts = [{**each, "prompts": prompts} if each["name"] == "law" else each for each in shop.recipe["experts"]]
    sizes = {"tokens_per_domain": 10**6, "sequence_length": 64}
    select = read_selections(recipe_of(shop, experts=experts), shop.root, [shop.root / "base"], **sizes)["select"]
    assert not {digest_of(prompt)[:TRAINED_DIGITS] for prompt in prompts} & set(select.digests)


@pytest.mark.slow
def test_two_processes_share_a_search(shop: Workshop) -> None:
    settings = TuneSettings(trials=14, tokens_per_domain=300, sequence_length=32, processes=2)
    results = tune(recipe_of(shop), shop.root, shop.root / "TWO", space=SMALL, settings=settings)
    assert 14 <= len(results.candidates) <= 16
    assert len({json.dumps(each.mixture, sort_keys=True) for each in results.candidates}) == len(results.candidates)


def test_every_choice_of_the_default_space_is_a_recipe(shop: Workshop) -> None:
    import random

    recipe, draw = recipe_of(shop), random.Random(0)
    space = default_space(
        recipe, shop.root, make_plan(plain_recipe(recipe), shop.root), native=recipe.output.format == "native"
    )
    assert "all" in space.modules and "average" in space.backbone  # these experts differ everywhere
    seen = set()
    for _ in range(300):
        mixture = space.mixture(space.choose(lambda _axis, labels: draw.choice(labels)), recipe)
        candidate_recipe(recipe, mixture)
        seen.add(describe(mixture))
    assert len(seen) > 150
    assert set(space.named()) >= {"gate-less (linear)", "noisy", "logistic", "n-gram", "whole models, n-gram"}


def test_fixed_variants_of_whole_models_bear_their_own_names() -> None:
    only = Space(router=["linear", "ngram"], order=[2], ngram_decay=[0.98], temperature=[1.0], top_k=[2], modules=["all"])
    assert set(only.named()) == {"whole models, n-gram"}


def test_backbones_are_searched_only_where_they_differ(shop: Workshop, tmp_path: Path) -> None:
    recipe = recipe_of(shop)
    assert backbones_differ(recipe, shop.root)
    same = recipe_of(shop, experts=[{"name": n, "model": "./base", "text": f"./text/{n}.jsonl"} for n in DOMAINS])
    assert not backbones_differ(same, shop.root)
    space = default_space(same, shop.root, make_plan(plain_recipe(same), shop.root), native=False)
    assert space.backbone == ["base"] and space.modules == ["auto"]


def test_native_searches_what_native_can_say(shop: Workshop) -> None:
    recipe = recipe_of(shop)
    space = default_space(recipe, shop.root, make_plan(plain_recipe(recipe), shop.root), native=True)
    choices: list[str] = []
    mixture = space.mixture(space.choose(lambda axis, labels: (choices.append(axis), labels[-1])[1]), recipe)
    assert candidate_recipe(recipe, mixture).mixture.beyond_native() == []
    assert "ngram" not in space.router and space.granularity == ["token"]


def test_native_is_what_comes_out(shop: Workshop) -> None:
    """Whatever the space, the recipe's format or its router say; adapters, which a native build folds in, are refused."""
    space = SMALL.model_copy(update={"router": ["linear", "ngram"], "order": [2], "backbone": ["base"]})
    modekit, native = {"format": "modekit"}, {"format": "native"}
    out = shop.root / "NATIVE"
    results = tune(recipe_of(shop, output=modekit), shop.root, out, space=space, settings=SETTINGS, native=True)
    assert open_checkpoint(out).shape.plain and results.best.native
    ngram = [each for each in results.candidates if each.mixture.get("router", {}).get("fit") == "ngram"]
    assert ngram and all("cannot say" in each.why for each in ngram)
    plain = space.model_copy(update={"router": ["linear"]})
    results = tune(recipe_of(shop, output=modekit), shop.root, shop.root / "NOT", space=plain, settings=SETTINGS)
    assert not open_checkpoint(shop.root / "NOT").shape.plain and not results.best.native
    experts = [{**each, "as": "lora"} for each in shop.recipe["experts"]]
    with pytest.raises(TuneError, match="candidates keep adapters low-rank"):
        tune(recipe_of(shop, experts=experts), shop.root, shop.root / "FOLDED", settings=SETTINGS, native=True)
    recipe = recipe_of(shop, output=native)
    assert (
        "ngram"
        not in default_space(
            recipe, shop.root, make_plan(plain_recipe(recipe), shop.root), native=recipe.output.format == "native"
        ).router
    )


def test_an_adapter_of_lower_layers_stops_no_search(tmp_path: Path) -> None:
    """Mixing the upper layers alone would lose it: refused, and the search goes on."""
    made = make_workshop(tmp_path)
    tensors = {name: tensor for name, tensor in UP.items() if ".0." in name}
    write_adapter(tmp_path / "low", tensors, layers_to_transform=[0])
    law = {"name": "law", "adapter": "./low", "text": "./text/law.jsonl"}
    recipe = recipe_of(made, experts=[law if each["name"] == "law" else each for each in made.recipe["experts"]])
    space = SMALL.model_copy(update={"router": ["linear"], "backbone": ["base"], "layers": [None, ["1-2"]]})
    results = tune(recipe, tmp_path, tmp_path / "OUT", space=space, settings=SETTINGS)
    assert [each.status for each in results.candidates if "layers" in each.mixture] == ["refused"]


def test_pareto() -> None:
    def candidate(number: int, loss: float, active: int, status: Any = "scored") -> Candidate:
        return Candidate(number=number, mixture={}, status=status, losses={"a": loss}, tokens=1, active=active)

    found = [
        candidate(0, 3.0, 10),
        candidate(1, 2.0, 20),
        candidate(2, 2.5, 15),
        candidate(3, 2.6, 17),
        candidate(4, 1.0, 5, "dropped"),
        candidate(5, 3.0, 9),
    ]
    assert [each.number for each in pareto(found)] == [5, 2, 1]


def test_rungs_cover_the_text_once(shop: Workshop) -> None:
    sizes = {"tokens_per_domain": 300, "sequence_length": 32}
    select = read_selections(recipe_of(shop), shop.root, [shop.root / "base"], **sizes)["select"]
    for place, domain in enumerate(select.domains):
        parts = [part for number in range(len(RUNGS)) for part in select.rung(number) if part.expert == place]
        assert [s.ids for part in parts for s in part.sequences] == [s.ids for s in domain.sequences]


def test_a_space_from_a_file(shop: Workshop, tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump({"router": ["ridge"], "top_k": [1], "backbone": ["base", {"expert": "law"}]}))
    space = read_space(path, SMALL)
    assert space.router == ["ridge"] and space.temperature == SMALL.temperature
    recipe = recipe_of(shop)
    mixture = space.mixture(space.choose(lambda _axis, labels: labels[-1]), recipe)
    assert candidate_recipe(recipe, mixture).mixture.backbone.expert == "law"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("router: [ridgy]", r"space\.yaml\s+found:\s+router\.0: must be "),
        ("top_k: 2", "lists under router"),
        ("tempo: [1.0]", "tempo"),
        ("- router", "not a mapping"),
        ("router: [", r"cannot be read(.|\n)*in space\.yaml, line 1"),
    ],
)
def test_a_wrong_space(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(content)
    with pytest.raises(RecipeError, match=message):
        read_space(path, SMALL)


def test_a_space_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"found:\s+No such file or directory\n\s+to do:\s+correct the path$"):
        read_space(tmp_path / "space.yaml", SMALL)


def test_refusals(shop: Workshop, tuned: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(shop)
    with pytest.raises(OutputError, match="exists"):
        tune(recipe, shop.root, shop.root / "TUNED", space=SMALL, settings=SETTINGS)
    with pytest.raises(TuneError, match="another search"):
        tune(recipe, shop.root, shop.root / "TUNED", settings=SETTINGS, overwrite=True)
    silent = recipe_of(shop, experts=[{"name": n, "model": f"./{n}"} for n in DOMAINS], mixture={"method": "linear"})
    with pytest.raises(TextError, match="no text to choose by"):
        tune(silent, shop.root, shop.root / "SILENT", space=SMALL, settings=SETTINGS)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModekitError, match="a package is not installed"):
        tune(recipe, shop.root, shop.root / "RAY", space=SMALL, settings=TuneSettings(ray=True))


def test_without_optuna(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    without("optuna", "modekit.search.tune", monkeypatch)
    code, _, said = ended("tune", shop.write(), shop.root / "NONE")
    assert code == 2 and "modekit[tune]" in said and "Traceback" not in said


def test_two_commands_do_not_share_a_search(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    import modekit.search.tune.tune as run_module

    def again(*_: Any) -> None:
        with pytest.raises(TuneError, match="another command is at this search"):
            tune(recipe_of(shop), shop.root, shop.root / "SHARED", space=SMALL, settings=SETTINGS)
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "launch", again)
    with pytest.raises(KeyboardInterrupt):
        tune(recipe_of(shop), shop.root, shop.root / "SHARED", space=SMALL, settings=SETTINGS)


def test_too_little_text(shop: Workshop) -> None:
    (shop.root / "text" / "short.jsonl").write_text(json.dumps({"text": "one document only"}) + "\n")
    experts = [{**each, "text": "./text/short.jsonl"} if each["name"] == "law" else each for each in shop.recipe["experts"]]
    with pytest.raises(TextError, match=r"of the (select|report) split is left"):
        tune(recipe_of(shop, experts=experts), shop.root, shop.root / "SHORT", space=SMALL, settings=SETTINGS)


def test_a_variant_that_cannot_be_built_is_named(shop: Workshop) -> None:
    """top_k beyond the number of experts: refused, with the reason, and the search goes on."""
    space = SMALL.model_copy(update={"router": ["random"], "top_k": [2, 9], "always_on": [None]})
    results = tune(recipe_of(shop), shop.root, shop.root / "REFUSED", space=space, settings=SETTINGS)
    refused = [each for each in results.candidates if each.status == "refused"]
    assert len(refused) == 2  # once per backbone, however often they are drawn
    assert all("only 3 experts" in each.why for each in refused)
    assert "only 3 experts" in results.markdown()
    assert results.best.status == "scored"


def test_a_loss_that_is_no_number_stops_with_its_place(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    import modekit.search.tune.selection as selection_module

    score = type("Score", (), {"loss": float("nan")})
    monkeypatch.setattr(selection_module, "score_domain", lambda *_: score)
    with pytest.raises(ModekitError, match="candidate 0, domain medicine"):
        tune(recipe_of(shop), shop.root, shop.root / "NAN", space=SMALL, settings=SETTINGS)


def test_the_recipes_own_mixture_is_a_candidate(shop: Workshop) -> None:
    """Even where no axis says it."""
    own = {"method": "linear", "weights": {"medicine": 3.0, "law": 1.0, "code": 1.0}}
    space = SMALL.model_copy(update={"router": ["random"], "top_k": [1]})
    results = tune(recipe_of(shop, mixture=own), shop.root, shop.root / "OWN", space=space, settings=SETTINGS)
    mine = next(each for each in results.candidates if each.name == "the recipe's own")
    assert mine.mixture == own and mine.report is not None


def test_a_smaller_mixture_is_scored_in_full_for_the_front(tuned: tuple[Path, Any]) -> None:
    _, results = tuned
    sizes = {each.active for each in results.candidates if each.status != "refused" and each.active <= results.best.active}
    assert sizes == {each.active for each in results.candidates if each.status == "scored" and each.active in sizes}
    front = [each.active for each in results.front]
    assert front == sorted(set(front)) and results.front[-1].mean == results.best.mean


@pytest.mark.parametrize("own", [{"top_p": 0.7, "router": {"fit": "random"}}, {"router": {**FIT, "granularity": "context"}}])
def test_a_recipe_that_leaves_defaults_unsaid_is_searched_and_described(shop: Workshop, own: dict[str, Any]) -> None:
    space = SMALL.model_copy(update={"router": ["linear"]})
    out = shop.root / f"UNSAID-{len(own)}"
    results = tune(recipe_of(shop, mixture=own), shop.root, out, space=space, settings=SETTINGS)
    mine = next(each for each in results.candidates if each.name == "the recipe's own")
    assert mine.mixture == {**own, "router": {"fit": "logistic", **own["router"]}} and mine.description and results.markdown()
