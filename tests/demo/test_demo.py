"""The demo: its text, its folder, and (slow) a whole quick run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import modekit.demo.demo as seed_module
from kills import dies
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.open import open_checkpoint
from modekit.demo.demo import run_demo
from modekit.demo.kinds import AS_MIXED, MIXTURES, Kind
from modekit.demo.text import DOMAINS, GENERAL, LANGUAGES, UNSEEN, unpack_text
from modekit.errors import OutputError
from modekit.recipes.choices import choices
from modekit.recipes.read import parse_recipe
from modekit.run import Run, silent
from modekit.text.documents import read_documents
from modekit.text.splits import documents_of_split


def test_the_shipped_text_is_enough_and_no_document_is_in_two_domains(tmp_path: Path) -> None:
    seen: dict[str, str] = {}
    for name, path in unpack_text(tmp_path).items():
        documents = read_documents([str(path)], root=tmp_path, where=name)
        if name in DOMAINS:
            assert len(documents_of_split(documents, "report")) >= 30
            assert sum(map(len, documents_of_split(documents, "fit"))) > 250_000
        assert not {seen[document] for document in documents if document in seen}
        seen.update(dict.fromkeys(documents, name))
    assert set(seen.values()) == {*DOMAINS, GENERAL, UNSEEN}
    assert "WordNet" in (tmp_path / "NOTICE").read_text()


def test_three_languages_have_the_same_documents_by_their_id(tmp_path: Path) -> None:
    paths = unpack_text(tmp_path, LANGUAGES)
    records = {name: [json.loads(line) for line in path.read_text().splitlines()] for name, path in paths.items()}
    ids = {name: [record["id"] for record in found] for name, found in records.items()}
    assert len(set(ids["english"])) == len(ids["english"]) >= 300
    assert ids["english"] == ids["french"] == ids["german"]
    for found in records.values():
        assert sum(len(record["text"].encode()) for record in found) >= 250_000
        assert all(40 <= len(record["text"].split()) <= 300 for record in found)
    common = {"english": "the", "french": "de", "german": "der"}
    for name, word in common.items():
        told = {each: sum(record["text"].split().count(word) for record in found) for each, found in records.items()}
        assert max(told, key=lambda each: told[each]) == name
    assert "Django Software Foundation" in (tmp_path / "NOTICE").read_text()


def test_a_folder_of_another_kind_of_demo_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class ReachedError(Exception):
        pass

    def reached(*_: Any) -> Any:
        raise ReachedError

    monkeypatch.setattr(seed_module, "run_seed", reached)
    with pytest.raises(ReachedError):
        run_demo(tmp_path / "demo", run=Run(progress=silent))
    for other in ({"quick": True}, {"what": "full"}, {"what": "translation"}):
        with pytest.raises(OutputError, match="another kind"):
            run_demo(tmp_path / "demo", run=Run(progress=silent), **other)  # type: ignore[arg-type]
    (tmp_path / "demo" / "demo.json").write_text("what somebody else put here")
    with pytest.raises(OutputError, match="another kind"):
        run_demo(tmp_path / "demo", run=Run(progress=silent))


def test_the_row_routing_is_what_a_recipe_gets_that_names_no_router() -> None:
    for what, mixtures in MIXTURES.items():
        if "routing" in mixtures:
            kind = Kind(what, quick=True)
            texts = {name: Path(f"{name}.jsonl") for name in (*kind.domains, *kind.unseen)}
            said = {name: seed_module.recipe_of(kind, mixtures[name], texts) for name in ("routing", "linear")}
            assert said["routing"]["mixture"]["router"] == {} and "router" not in said["linear"]["mixture"]
            assert next(router.mixture.router.fit for router, _ in choices(parse_recipe(said["routing"]))) == "lexical"


def test_the_row_that_is_named_as_a_mixs_own_is_what_an_open_recipe_becomes() -> None:
    for what, name in AS_MIXED.items():
        kind = Kind(what, quick=True)
        texts = {name: Path(f"{name}.jsonl") for name in (*kind.domains, *kind.unseen)}
        shown = parse_recipe(seed_module.recipe_of(kind, kind.mixtures[name], texts))
        experts = [{"name": each.name, "model": each.source, "text": each.text} for each in shown.experts]
        (first, _), *_ = choices(parse_recipe({"base_model": "./base", "experts": experts}))
        asked = {"fit": "lexical", "orders": None}
        for mixture in (first.mixture, shown.mixture):
            assert mixture.top_k == 1
            assert {key: getattr(mixture.router, key) for key in asked} == asked and mixture.backbone == "base"


@pytest.mark.slow
def test_a_quick_demo_and_its_resumption(tmp_path: Path, quick_demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(quick_demo, tmp_path / "demo")
    first = json.loads((folder / "results" / "demo.json").read_text())

    def no_training(*_: Any, **__: Any) -> Any:
        raise AssertionError("a finished model was trained again")

    for name in ("make_base", "specialize", "build"):
        monkeypatch.setattr(seed_module, name, no_training)
    again = run_demo(folder, quick=True, run=Run(progress=silent))
    assert json.loads(json.dumps(again.as_data())) == first
    table = again.merged(0)
    mixtures = ["linear", "noisy", "logistic", "context", "routing", "lexical-top-1"]
    assert [row.name for row in table.rows] == ["base", *DOMAINS, "weight average", "oracle", *mixtures]
    for name in DOMAINS:
        assert table.row("oracle").scores[name].loss == pytest.approx(table.row(name).scores[name].loss, abs=1e-3)


@pytest.mark.slow
def test_a_quick_demo_of_adapters_shows_both_outputs(tmp_path: Path) -> None:
    table = run_demo(tmp_path / "demo", quick=True, what="lora", run=Run(progress=silent)).merged(0)
    assert [row.name for row in table.rows] == [
        "base",
        *DOMAINS,
        "weight average",
        "oracle",
        "oracle modekit",
        "oracle average",
        "linear",
        "routing",
        "bigrams-top-1",
        "routing modekit",
        "routing average",
    ]
    for name in DOMAINS:  # low-rank experts are carried whole
        assert table.row("oracle").scores[name].loss == pytest.approx(table.row(name).scores[name].loss, abs=1e-3)
    seed = tmp_path / "demo" / "seed0"
    assert (seed / DOMAINS[0] / "adapter_config.json").exists()
    low_rank, plain = (json.loads((seed / name / "config.json").read_text()) for name in ("routing-modekit", "routing"))
    assert low_rank["architectures"] != plain["architectures"] == ["MixtralForCausalLM"]


_CHANGES = 211
"""Changes of a file between two kills: more than a mixture needs that is begun anew, few enough for several kills."""


@pytest.mark.hostile
def test_a_demo_killed_over_and_over_ends_with_the_same_table(tmp_path: Path) -> None:
    folder, kills = tmp_path / "demo", 0

    def demo() -> None:
        run_demo(folder, quick=True, run=Run(progress=silent))

    while dies(demo, folder, _CHANGES):
        kills += 1
        assert kills < 30, "it does not get on"
        for made in (path.parent for path in folder.glob("seed0/*/modekit.json")):
            assert is_proven(verify(open_checkpoint(made), reload=False)), made
    assert kills > 2
    assert not list(folder.rglob("*.partial"))
    again = run_demo(folder, quick=True, run=Run(progress=silent)).merged(0)
    whole = run_demo(tmp_path / "whole", quick=True, run=Run(progress=silent)).merged(0)
    assert [(row.name, row.scores) for row in again.rows] == [(row.name, row.scores) for row in whole.rows]
