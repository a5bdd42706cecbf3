"""`modekit demo translation`: its pairs, a base that depends on its seed alone, and a whole quick run."""

from __future__ import annotations

import json
import lzma
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

import modekit.demo.demo as seed_module
import modekit.demo.translation as translation_module
from modekit.demo.demo import run_demo
from modekit.demo.kinds import Kind
from modekit.demo.text import CATALOGUES, GENERAL, PAIRED, UNSEEN_CATALOGUES, UNSEEN_PAIRED, aligned, unpack_pairs
from modekit.demo.translation import make_pair_base
from modekit.errors import ModekitError
from modekit.recipes.read import parse_recipe
from modekit.run import QUIET
from modekit.text.document import Pair
from modekit.text.documents import read_documents
from modekit.text.held_out import RecipeTexts
from modekit.text.splits import digest_of


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo's pairs by domain."""
    return unpack_pairs(tmp_path_factory.mktemp("pairs") / "text")


def records(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").strip().split("\n")]


def shipped(language: str) -> dict[str, list[str]]:
    data = (files("modekit.demo") / "text" / f"{language}.jsonl.xz").read_bytes()
    found = [json.loads(line) for line in lzma.decompress(data).decode().strip().split("\n")]
    return {record["id"]: record["text"].split("\n") for record in found}


def pairs_of(path: Path) -> list[Pair]:
    return [pair for pair in read_documents([str(path)], root=path.parent, where="text") if isinstance(pair, Pair)]


def test_a_pair_is_the_same_line_of_the_same_document_of_its_domain_s_catalogue(texts: dict[str, Path]) -> None:
    english, french = shipped("english"), shipped("french")
    packages = {**CATALOGUES, **UNSEEN_CATALOGUES}
    for name, path in texts.items():
        for record in records(path):
            document, _, line = record["id"].rpartition(":")
            sides = [language[document][int(line) - 1] for language in (english, french)]
            assert len(english[document]) == len(french[document])
            for side, kept in zip(sides, (record["source"], record["target"]), strict=True):
                assert "<" in side or " ".join(side.split()) == kept
                assert 3 <= len(kept) <= 160
            package = document.partition("/")[0]
            assert package == packages[name] if name in packages else package not in packages.values()
        assert len(pairs_of(path)) == len(records(path))


def test_documents_of_unequal_length_and_lines_without_text_are_no_pairs() -> None:
    english = {"a/1": "One <b>word</b>\n<hr>\n12345\nfine  too", "a/2": "one\ntwo", "a/3": "alone", "a/4": "x" * 161}
    french = {"a/1": "Un mot\n<hr>\n12345\nbien aussi", "a/2": "un deux", "a/4": "y"}
    assert list(aligned(english, french)) == [
        {"id": "a/1:1", "source": "One word", "target": "Un mot"},
        {"id": "a/1:4", "source": "fine too", "target": "bien aussi"},
    ]


def test_there_is_enough_and_what_is_held_out_or_unseen_trains_nothing(texts: dict[str, Path]) -> None:
    kind = Kind("translation", quick=True)
    folder = texts[GENERAL].parent.parent / "seed0"
    recipe = parse_recipe(seed_module.recipe_of(kind, kind.mixtures["lexical"], texts), where="recipe")
    held_out = {each.name: each for each in RecipeTexts(recipe, folder).report()}
    trained = {digest_of(pair) for place in range(len(PAIRED)) for pair in RecipeTexts(recipe, folder).fit(place)}
    assert list(held_out) == [*PAIRED, *UNSEEN_PAIRED]
    for name, found in held_out.items():
        shown = {digest_of(pair) for pair in found.documents}
        assert len(shown) >= 50 and not shown & trained
        if name in PAIRED:  # the select split is shown, too: nothing is chosen by it
            assert len(pairs_of(texts[name])) * 0.15 < len(shown) < len(pairs_of(texts[name])) * 0.25
        else:
            assert found.expert is None and len(shown) == len(pairs_of(texts[name]))
    seen = {pair.source.lower() for name in (*PAIRED, GENERAL) for pair in pairs_of(texts[name])}
    for name in UNSEEN_PAIRED:
        assert not {pair.source.lower() for pair in pairs_of(texts[name])} & seen
    for path in texts.values():
        sources = [pair.source.lower() for pair in pairs_of(path)]
        assert len(set(sources)) == len(sources)
    assert "Django Software Foundation" in (texts[GENERAL].parent / "NOTICE").read_text(encoding="utf-8")


def test_a_base_depends_on_its_seed_alone_and_its_fine_tunes_drop_nothing(tmp_path: Path, texts: dict[str, Path]) -> None:
    for name, seed in (("one", 3), ("again", 3), ("other", 4)):
        make_pair_base(tmp_path / name, texts, steps=2, seed=seed, run=QUIET)
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "again", "other")}
    assert weights["one"] == weights["again"] != weights["other"]
    config = json.loads((tmp_path / "one" / "config.json").read_text(encoding="utf-8"))
    assert {config[key] for key in ("dropout", "attention_dropout", "activation_dropout")} == {0.0}


def test_a_lack_of_sacrebleu_is_said_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(ModekitError, match=r"modekit\[translation\]"):
        run_demo(tmp_path / "demo", what="translation", run=QUIET)
    assert not (tmp_path / "demo").exists()


@pytest.mark.slow
def test_a_quick_demo_of_translation_and_its_resumption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run_demo(tmp_path / "demo", quick=True, what="translation", run=QUIET)
    mixtures = ["lexical", "lexical-top-1"]
    losses, written = first.merged(0), first.translated[0]
    assert [row.name for row in losses.rows] == ["base", *PAIRED, "weight average", "oracle", *mixtures]
    assert [row.name for row in written.rows] == ["base", *PAIRED, "oracle", *mixtures]
    for name in PAIRED:  # what is mixed is all that experts have of their own
        assert losses.row("oracle").scores[name].loss == pytest.approx(losses.row(name).scores[name].loss, abs=1e-4)
        assert written.row("oracle").scores[name] == written.row(name).scores[name]
    page = (tmp_path / "demo" / "seed0" / "lexical" / "results" / "report.html").read_text(encoding="utf-8")
    assert 'id="translations"' in page and all(name in page for name in (*PAIRED, *UNSEEN_PAIRED))
    saved = json.loads((tmp_path / "demo" / "results" / "demo.json").read_text(encoding="utf-8"))
    assert saved == json.loads(json.dumps(first.as_data()))
    assert any("a smoke run (--quick)" in note for note in losses.notes)

    def again(*_: Any, **__: Any) -> Any:
        raise AssertionError("what was there was made again")

    for name in ("make_pair_base", "specialize", "build"):
        monkeypatch.setattr(seed_module, name, again)
    monkeypatch.setattr(translation_module, "evaluate_translation", again)
    assert run_demo(tmp_path / "demo", quick=True, what="translation", run=QUIET).as_data() == first.as_data()
