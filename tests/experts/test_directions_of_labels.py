"""Texts of one call go the same way, whatever names them: labels, text of no domain, a text that is given for a domain."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from modekit.checkpoint.checkpoint import open_checkpoint
from modekit.demo.text import aligned, unpack_text
from modekit.errors import TextError
from modekit.experts.distill.inputs import read_texts as read_for_a_student
from modekit.experts.labelled import Generic, Labelled, Reading, read_material
from modekit.loaded.text_training import Training
from modekit.run import QUIET
from modekit.text.held_out import read_text
from modekit.text.pairs import Pair
from modekit.text.records import data_of
from modekit.training.settings import train_settings
from modekit.training.texts import read_texts
from pair_models import make_pair_workshop, pair_tokenizer

TRAINING = Training(sequence_length=400)
SAME_WAY = "do not go the same way"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Messages of two programs, English to French, and those of the second the other way."""
    root = tmp_path_factory.mktemp("directions")
    languages = ("english", "french")
    texts = {}
    for language, path in unpack_text(root / "text", languages).items():
        records = map(json.loads, path.read_text(encoding="utf-8").strip().split("\n"))
        texts[language] = {record["id"]: record["text"] for record in records}
    found: dict[str, list[Pair]] = {}
    for record in aligned(*(texts[language] for language in languages)):
        found.setdefault(record["id"].partition("/")[0], []).append(Pair(record["source"], record["target"]))
    write(root / "trac.jsonl", found["trac"])
    write(root / "wagtail.jsonl", found["wagtail"])
    write(root / "back.jsonl", [Pair(pair.target, pair.source) for pair in found["wagtail"]])
    write(
        root / "half.jsonl",
        [*found["wagtail"][:300], *(Pair(pair.target, pair.source) for pair in found["wagtail"][300:360])],
    )
    write(root / "same.jsonl", [Pair(pair.source, pair.source) for pair in found["django"]])
    return root


def write(path: Path, pairs: list[Pair]) -> None:
    path.write_text("".join(json.dumps(data_of(pair)) + "\n" for pair in pairs[:400]), encoding="utf-8")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return pair_tokenizer()


def labelled(**texts: str) -> Labelled:
    return Labelled({name: [f"./{spec}.jsonl"] for name, spec in texts.items()})


def test_labels_that_go_opposite_ways_are_refused(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    for one, other in permutations(("trac", "back")):
        with pytest.raises(TextError, match=SAME_WAY) as caught:
            read_material(labelled(one=one, other=other), None, Reading(tokenizer, folder, TRAINING))
        assert caught.value.where == "--text one=... and --text other=..." and caught.value.remedy
    assert read_material(labelled(one="trac", other="wagtail"), None, Reading(tokenizer, folder, TRAINING)).fit


@pytest.mark.parametrize("texts", [["./trac.jsonl"], labelled(trac="trac")], ids=["one domain", "labels"])
def test_text_of_no_domain_goes_the_same_way(folder: Path, tokenizer: PreTrainedTokenizerFast, texts: Any) -> None:
    with pytest.raises(TextError, match=SAME_WAY) as caught:
        read_material(texts, Generic(["./back.jsonl"]), Reading(tokenizer, folder, TRAINING))
    assert "--text" in str(caught.value.where) and str(caught.value.where).endswith("and --generic")
    assert read_material(texts, Generic(["./wagtail.jsonl"]), Reading(tokenizer, folder, TRAINING)).fit


@pytest.mark.parametrize("mix", [None, "equal", "turns"])
def test_texts_of_a_student_go_the_same_way(folder: Path, tokenizer: PreTrainedTokenizerFast, mix: Any) -> None:
    with pytest.raises(TextError, match="way") as caught:
        read_for_a_student(["./trac.jsonl", "./back.jsonl"], folder, tokenizer, TRAINING, mix)
    if mix is not None:
        assert caught.value.where == "--text ./trac.jsonl and --text ./back.jsonl"


@pytest.mark.parametrize("modules", ["auto", "all"])
def test_a_training_asks_of_all_its_texts(folder: Path, tmp_path: Path, modules: str) -> None:
    """Those of the recipe, those given in their place, and text of no domain; whole models may go several ways."""
    shop = make_pair_workshop(tmp_path, "bart")
    for expert in shop.recipe["experts"]:
        expert["text"] = str(folder / "trac.jsonl")
    router = {"fit": "ngram", "buckets": 64, "sequence_length": 400}
    checkpoint = open_checkpoint(shop.build(mixture={"modules": modules, "top_k": 1, "router": router}))
    asked = {"what": ["mlp"], "sequence_length": 400}
    right, back = str(folder / "wagtail.jsonl"), str(folder / "back.jsonl")

    def read(texts: dict[str, list[str]], *generic: str) -> object:
        settings = train_settings({**asked, **({"generic": list(generic)} if generic else {})}, where="test")
        return read_texts(checkpoint, settings, texts, tmp_path, run=QUIET)

    assert read({"law": [right]}, right)
    for texts, generic, where in (({"law": [back]}, (), "--text law"), ({}, (back,), "generic")):
        if modules == "all":
            assert read(texts, *generic)
            continue
        with pytest.raises(TextError, match=SAME_WAY) as caught:
            read(texts, *generic)
        assert where in str(caught.value.where) and "experts[0] 'medicine': text" in str(caught.value.where)


@pytest.mark.parametrize(
    ("texts", "says", "where"),
    [
        (["trac", "half"], "some pairs of a text", "--text ./half.jsonl"),
        (["trac", "back"], "do not go the same way", "--text ./trac.jsonl and --text ./back.jsonl"),
        (["half"], "some pairs of a text", "--text"),
        (["same"], "nearly all pairs", "--text"),
    ],
)
def test_of_several_texts_the_wrong_one_is_named(folder: Path, texts: list[str], says: str, where: str) -> None:
    with pytest.raises(TextError, match=says) as caught:
        read_text([f"./{name}.jsonl" for name in texts], root=folder, where="--text")
    assert caught.value.where == where
