"""The note on texts whose pairs go opposite ways, against the parallel text that comes with modekit."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path

import pytest

from modekit.demo.text import LANGUAGES, aligned, unpack_text
from modekit.recipes.read import parse_recipe
from modekit.text.document import Document, Pair
from modekit.text.glance import check_texts, notes_on_directions
from modekit.text.records import data_of

Corpus = dict[str, list[Pair]]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Corpus]:
    """Source and target language -> package -> its messages as pairs, of packages with 30 or more."""
    texts = {}
    for language, path in unpack_text(tmp_path_factory.mktemp("text"), LANGUAGES).items():
        records = map(json.loads, path.read_text(encoding="utf-8").strip().split("\n"))
        texts[language] = {record["id"]: record["text"] for record in records}
    made: dict[tuple[str, str], Corpus] = {}
    for languages in permutations(LANGUAGES, 2):
        found: Corpus = {}
        for record in aligned(*(texts[language] for language in languages)):
            found.setdefault(record["id"].partition("/")[0], []).append(Pair(record["source"], record["target"]))
        made[languages] = {name: pairs for name, pairs in found.items() if len(pairs) >= 30}
    return made


def swapped(pairs: list[Pair]) -> list[Document]:
    return [Pair(pair.target, pair.source) for pair in pairs]


@pytest.mark.parametrize("languages", permutations(LANGUAGES, 2), ids="-".join)
def test_a_swapped_text_is_noted_and_no_other(corpora: dict[tuple[str, str], Corpus], languages: tuple[str, str]) -> None:
    corpus = corpora[languages]
    assert len(corpus) > 5 and not list(notes_on_directions(corpus))
    for name in corpus:
        notes = list(notes_on_directions({**corpus, name: swapped(corpus[name])}))
        assert len(notes) == len(corpus) - 1 and all(name in note for note in notes)


def test_few_pairs_and_plain_text_say_nothing(corpora: dict[tuple[str, str], Corpus]) -> None:
    corpus = corpora["english", "german"]
    assert not list(notes_on_directions({"few": swapped(corpus["trac"][:29]), "plain": ["text"] * 100, **corpus}))


@pytest.mark.parametrize("modules", ["auto", "all"])
def test_a_plan_says_so(corpora: dict[tuple[str, str], Corpus], tmp_path: Path, modules: str) -> None:
    """Not of whole models, each source of which goes to one of them."""
    corpus = corpora["english", "french"]
    for name, pairs in {"one": corpus["trac"], "two": swapped(corpus["wagtail"])}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(data_of(pair)) + "\n" for pair in pairs))
    experts = [{"name": name, "model": name, "text": f"./{name}.jsonl"} for name in ("one", "two")]
    mixture = {"modules": modules, "router": {"fit": "ngram"}}
    recipe = parse_recipe({"base_model": "b", "experts": experts, "mixture": mixture}, where="test")
    notes = check_texts(recipe, tmp_path, "pairs")
    assert [note.partition(":")[0] for note in notes] == (["two"] if modules == "auto" else [])
