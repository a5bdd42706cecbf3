"""Pairs whose sides are swapped, mixed or not translated, against the parallel text that comes with modekit."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from itertools import pairwise, permutations
from pathlib import Path

import pytest
import yaml

from modekit.building.build import build
from modekit.demo.pairs import aligned
from modekit.demo.text import DOMAINS, LANGUAGES, unpack_text
from modekit.errors import TextError
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe
from modekit.text.directions import Directions, check_pairs
from modekit.text.documents import read_documents
from modekit.text.held_out import RecipeTexts, read_text
from modekit.text.pairs import Pair
from modekit.text.records import data_of
from pair_models import make_pair_workshop
from pair_models import pairs as few_words

Corpus = dict[str, list[Pair]]
PACKAGES = ("django", "trac", "wagtail", "django_localflavor")


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Corpus]:
    """Source and target language -> package -> its messages as pairs, in an order that was drawn."""
    texts = {}
    for language, path in unpack_text(tmp_path_factory.mktemp("text"), LANGUAGES).items():
        records = map(json.loads, path.read_text(encoding="utf-8").strip().split("\n"))
        texts[language] = {record["id"]: record["text"] for record in records}
    made: dict[tuple[str, str], Corpus] = {}
    for languages in permutations(LANGUAGES, 2):
        found: Corpus = {}
        for record in aligned(*(texts[language] for language in languages)):
            found.setdefault(record["id"].partition("/")[0], []).append(Pair(record["source"], record["target"]))
        made[languages] = {
            name: random.Random(0).sample(pairs, len(pairs)) for name, pairs in found.items() if len(pairs) >= 60
        }
    return made


def swapped(pairs: Iterable[Pair]) -> list[Pair]:
    return [Pair(pair.target, pair.source) for pair in pairs]


def write(path: Path, pairs: Iterable[Pair]) -> str:
    path.write_text("".join(json.dumps(data_of(pair)) + "\n" for pair in pairs), encoding="utf-8")
    return f"./{path.name}"


@pytest.mark.parametrize("languages", permutations(LANGUAGES, 2), ids="-".join)
def test_true_text_passes_and_one_swapped_text_does_not(
    corpora: dict[tuple[str, str], Corpus], languages: tuple[str, str]
) -> None:
    corpus = corpora[languages]
    known = Directions()
    for name, pairs in corpus.items():
        check_pairs(pairs, where=name)
        known.add(pairs, where=name)
    for name, pairs in corpus.items():
        one = Directions()
        other = next(each for each in corpus if each != name)
        one.add(corpus[other], where=other)
        with pytest.raises(TextError, match="do not go the same way") as caught:
            one.add(swapped(pairs), where=name)
        assert other in str(caught.value.where) and name in str(caught.value.where)
        assert "nats per three characters" in str(caught.value.found) and caught.value.remedy


def test_some_swapped_pairs_within_a_text(corpora: dict[tuple[str, str], Corpus]) -> None:
    for pairs in corpora["english", "german"].values():
        for share in (0.1, 0.3):
            some = swapped(pairs[: round(share * len(pairs))])
            with pytest.raises(TextError, match="some pairs of a text go one way") as caught:
                check_pairs(random.Random(1).sample([*some, *pairs[len(some) :]], len(pairs)), where="here")
            assert " pairs, such as " in str(caught.value.found)


def test_text_that_is_not_translated(corpora: dict[tuple[str, str], Corpus]) -> None:
    for name, pairs in corpora["english", "french"].items():
        with pytest.raises(TextError, match="same text on both sides"):
            check_pairs([Pair(pair.source, pair.source) for pair in pairs], where=name)
        part = len(pairs) // 3
        some = [*(Pair(pair.source, pair.source) for pair in pairs[:part]), *pairs[part:]]
        check_pairs(random.Random(1).sample(some, len(some)), where=name)
        if name == "django":
            continue
        known = Directions()
        known.add(corpora["english", "french"]["django"], where="django")
        with pytest.raises(TextError, match="both read as sources of the first"):
            known.add([Pair(one.source, other.source) for one, other in pairwise(pairs)], where=name)
        with pytest.raises(TextError, match="both read as targets of the first"):
            known.add([Pair(one.target, other.target) for one, other in pairwise(pairs)], where=name)


def test_what_says_its_direction_may_have_several(corpora: dict[tuple[str, str], Corpus]) -> None:
    pairs = corpora["english", "german"]["django"]
    to_german = [Pair(f"translate English to German: {pair.source}", pair.target) for pair in pairs]
    to_english = [Pair(f">>eng<< {pair.source}", pair.target) for pair in swapped(pairs)]
    known = Directions()
    for name, said in (("one", to_german), ("other", to_english)):
        check_pairs(said, where=name)
        known.add(said, where=name)
    check_pairs([each for both in zip(to_german, to_english, strict=True) for each in both], where="both")


def test_texts_of_several_languages_are_not_called_swapped(corpora: dict[tuple[str, str], Corpus]) -> None:
    for one, other in (("french", "german"), ("german", "french")):
        known = Directions()
        for name in ("trac", "wagtail", "django"):
            known.add(corpora["english", one][name], where=name)
        for name in ("trac", "wagtail", "django"):
            known.add(corpora["english", other][name], where=name)


def test_sides_of_one_language_say_nothing(tmp_path: Path) -> None:
    """Questions and answers, the beginning and the end of a text: no direction is found, and none is missed."""
    known = Directions()
    for domain, path in unpack_text(tmp_path, DOMAINS[:2]).items():
        texts = [text.split() for text in read_documents([str(path)], root=tmp_path, where=domain)][:200]
        pairs = [
            Pair(" ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])) for words in texts if len(words) > 9
        ]
        assert len(pairs) > 100
        for each in (pairs, swapped(pairs)):
            check_pairs(each, where=domain)
            known.add(each, where=domain)


def test_few_pairs_and_plain_text_say_nothing() -> None:
    known = Directions()
    for documents in (["plain"] * 100, [Pair("same", "same")] * 9, few_words(60), []):
        check_pairs(documents, where="here")
        known.add(documents, where="here")


# --- where it is asked


def test_whatever_reads_texts_asks(corpora: dict[tuple[str, str], Corpus], tmp_path: Path) -> None:
    corpus = corpora["english", "french"]
    good, bad = write(tmp_path / "good.jsonl", corpus["trac"]), write(tmp_path / "bad.jsonl", swapped(corpus["wagtail"]))
    mixed = write(tmp_path / "mixed.jsonl", [*corpus["trac"], *swapped(corpus["wagtail"])])
    with pytest.raises(TextError, match=r"some pairs of a text[\s\S]*--text"):
        read_text([mixed], root=tmp_path, where="--text")
    experts = [{"name": "one", "model": "x", "text": good}, {"name": "two", "model": "y", "text": bad}]
    recipe = parse_recipe({"base_model": "b", "experts": experts, "mixture": {"router": {"fit": "lexical"}}}, where="test")
    for ask in (RecipeTexts.report, RecipeTexts.select):
        with pytest.raises(TextError, match=r"do not go the same way[\s\S]*'one': text and experts\[1\] 'two': text"):
            ask(RecipeTexts(recipe, tmp_path))
    recipe = recipe.model_copy(update={"experts": recipe.experts[:1], "eval": {"music": [bad]}})
    with pytest.raises(TextError, match=r"'one': text and eval\.music"):
        RecipeTexts(recipe, tmp_path).report()


def test_a_build_asks_before_it_copies(corpora: dict[tuple[str, str], Corpus], tmp_path: Path) -> None:
    workshop = make_pair_workshop(tmp_path, "bart")
    corpus, said = corpora["english", "french"], workshop.recipe["experts"]
    for expert, pairs in zip(said, (corpus["trac"], corpus["wagtail"], swapped(corpus["django"])), strict=True):
        write(tmp_path / f"{expert['name']}.jsonl", pairs)
    workshop.write(mixture={"router": {"fit": "ngram", "buckets": 64}})
    recipe = parse_recipe(yaml.safe_load((tmp_path / "recipe.yaml").read_text()), where="test")
    with pytest.raises(TextError, match="do not go the same way"):
        build(make_plan(recipe, tmp_path), tmp_path / "OUT")
    assert not (tmp_path / "OUT").exists()
