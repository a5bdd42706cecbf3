"""Pairs whose sides are swapped, mixed or not translated, against the parallel text that comes with modekit."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from itertools import chain, pairwise, permutations
from pathlib import Path

import pytest
import yaml

from modekit.building.build import build
from modekit.demo.text import DOMAINS, LANGUAGES, aligned, unpack_text
from modekit.errors import TextError
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe
from modekit.text import directions
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
        made[languages] = {name: random.Random(0).sample(found[name], len(found[name])) for name in PACKAGES}
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


def test_the_same_on_both_sides(corpora: dict[tuple[str, str], Corpus]) -> None:
    """Refused where nearly all is: what is corrected is often right as it is, and British spelling mostly American."""
    for name, pairs in corpora["english", "french"].items():
        with pytest.raises(TextError, match="same text on both sides"):
            check_pairs(corrected(pairs, 0.97), where=name)
        check_pairs(corrected(pairs, 0.9), where=name)


def corrected(pairs: list[Pair], right: float) -> list[Pair]:
    """Sources that lack a letter, and what they should be; a share of them lacks none."""
    made = []
    for place, text in enumerate(pair.source for pair in pairs[:200]):
        middle = len(text) // 2
        made.append(Pair(text if place < right * 200 else text[:middle] + text[middle + 1 :], text))
    return made


def test_one_language_on_both_sides_beside_translations(corpora: dict[tuple[str, str], Corpus]) -> None:
    """Summaries of two messages, and corrections, in the source's language and the target's; in any order."""
    corpus = corpora["english", "german"]
    for written in ([pair.source for pair in corpus["wagtail"][:150]], [pair.target for pair in corpus["wagtail"][:150]]):
        summaries = [Pair(f"{one} {other}", one) for one, other in pairwise(written)]
        for untranslated in (summaries, corrected([Pair(text, text) for text in written], 0.5)):
            for texts in permutations((corpus["django"], untranslated)):
                known = Directions()
                for place, text in enumerate(texts):
                    check_pairs(text, where=str(place))
                    known.add(text, where=str(place))


def test_loan_words_say_nothing(corpora: dict[tuple[str, str], Corpus]) -> None:
    """Too few pairs that are long enough are not one language; nor does a text of them hide the direction of later ones."""
    words = ("Browser", "Server", "Login", "Update", "Link", "Cookie", "Team", "Event", "Blog", "Plugin")
    short = [Pair(f"the {word}", word) for word in words * 6]
    corpus = corpora["english", "german"]
    known = Directions()
    for name, text in (("short", short), ("wagtail", corpus["wagtail"]), ("again", short)):
        known.add(text, where=name)
    with pytest.raises(TextError, match="wagtail and swapped"):
        known.add(swapped(corpus["django"]), where="swapped")


def told(pairs: Iterable[Pair], *templates: str) -> list[Pair]:
    """Pairs whose sources are put into templates, by turns."""
    return [Pair(templates[at % len(templates)].format(pair.source), pair.target) for at, pair in enumerate(pairs)]


LONG = "You translate messages of programs. Please translate the following one from {} to {}: {{}}"


@pytest.mark.parametrize(
    ("there", "back"),
    [
        (["translate English to German: {}"], [">>eng<< {}"]),
        ([">>deu<<{}"], [">>eng<<{}"]),
        (["<2de>{}"], ["<2en>{}"]),
        (["翻译成德语:{}"], ["翻译成英语:{}"]),
        (["{} </s> en_XX"], ["{} </s> de_DE"]),
        (["{} -- in German, please"], ["{} -- in English, please"]),
        ([LONG.format("English", "German")], [LONG.format("German", "English")]),
        (["To German: {}", "German: {}"], ["To English: {}", "English: {}"]),
        (["German for: {}", "{} in German", "[de]{}"], ["{}"]),
    ],
)
def test_what_says_its_direction_may_have_several(
    corpora: dict[tuple[str, str], Corpus], there: list[str], back: list[str]
) -> None:
    pairs = corpora["english", "german"]["django"]
    to_german, to_english = told(pairs, *there), told(swapped(pairs), *back)
    known = Directions()
    for name, said in (("one", to_german), ("other", to_english)):
        check_pairs(said, where=name)
        known.add(said, where=name)
    for share in (100, 12):
        check_pairs(random.Random(1).sample([*to_german[:120], *to_english[:share]], 120 + share), where="both")


def test_three_tags_in_one_text(corpora: dict[tuple[str, str], Corpus]) -> None:
    german, french = corpora["english", "german"], corpora["english", "french"]
    texts = [
        told(german["wagtail"][:100], ">>deu<< {}"),
        told(swapped(german["trac"][:80]), ">>eng<< {}"),
        told(french["trac"][:70], ">>fra<< {}"),
    ]
    check_pairs(random.Random(3).sample(list(chain(*texts)), 250), where="here")


def test_the_same_instruction_for_both_ways_says_nothing(corpora: dict[tuple[str, str], Corpus]) -> None:
    corpus = corpora["english", "german"]
    right, wrong = told(corpus["trac"], "translate: {}"), told(swapped(corpus["wagtail"]), "translate: {}")
    known = Directions()
    known.add(right, where="right")
    with pytest.raises(TextError, match=r"do not go the same way[\s\S]*swap[\s\S]*or begin every source"):
        known.add(wrong, where="wrong")
    with pytest.raises(TextError, match=r"some pairs of a text[\s\S]*swap[\s\S]*or begin every source"):
        check_pairs(random.Random(1).sample([*right[:200], *wrong[:50]], 250), where="here")


LEADS = ["translate: {}", "Translate the text: {}", "Translate this sentence into the other language: {}", "__t__ {}"]


@pytest.mark.parametrize("template", LEADS)
def test_what_all_sources_begin_with_hides_no_direction(corpora: dict[tuple[str, str], Corpus], template: str) -> None:
    """Nearly all, or all: the words of a template are no language's, however long they are beside what follows."""
    corpus = corpora["english", "french"]
    right = told(corpus["trac"][:200], template)
    for name in ("wagtail", "django"):
        known = Directions()
        known.add(right, where="right")
        known.add(told(corpus[name][:200], template), where=name)
        for wrong in (told(swapped(corpus[name][:200]), template), told(swapped(corpus[name][:200]), *[template] * 19, "{}")):
            with pytest.raises(TextError, match="do not go the same way"):
                known.add(wrong, where="wrong")
    check_pairs(right, where="right")
    some = told([*swapped(corpus["trac"][:40]), *corpus["trac"][40:200]], template)
    with pytest.raises(TextError, match="some pairs of a text go one way"):
        check_pairs(random.Random(1).sample(some, 200), where="here")


def test_a_text_is_compared_with_every_kind(corpora: dict[tuple[str, str], Corpus], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with every text: one of each kind is enough, and whichever it is, a swapped text shows."""
    compared: list[None] = []
    nearer = directions._nearer
    monkeypatch.setattr(directions, "_nearer", lambda *given: (compared.append(None), nearer(*given))[1])
    german, french = corpora["english", "german"], corpora["english", "french"]
    known = Directions()
    for place in range(4):
        for name, corpus in (("german", german), ("french", french)):
            known.add(corpus["trac"][place * 60 : place * 60 + 120], where=f"{name} {place}")
    assert len(compared) == 2 * (1 + 6 * 2), "sources and targets: of the second text with the first, of six with both"
    for name, corpus in (("german", german), ("french", french)):
        with pytest.raises(TextError, match=f"{name} 0 and swapped"):
            known.add(swapped(corpus["wagtail"]), where="swapped")


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


def test_whole_models_may_go_several_ways(corpora: dict[tuple[str, str], Corpus], tmp_path: Path) -> None:
    corpus = corpora["english", "french"]
    one, two = write(tmp_path / "one.jsonl", corpus["trac"]), write(tmp_path / "two.jsonl", swapped(corpus["wagtail"]))
    experts = [{"name": "one", "model": "x", "text": one}, {"name": "two", "model": "y", "text": two}]
    mixture = {"modules": "all", "router": {"fit": "lexical"}}
    recipe = parse_recipe({"base_model": "b", "experts": experts, "mixture": mixture}, where="test")
    assert [held.name for held in RecipeTexts(recipe, tmp_path).report()] == ["one", "two"]
    mixed = write(tmp_path / "two.jsonl", [*corpus["trac"], *swapped(corpus["wagtail"])])
    assert mixed == two
    with pytest.raises(TextError, match="some pairs of a text"):
        RecipeTexts(recipe, tmp_path).report()


@pytest.mark.parametrize("modules", ["auto", "all"])
def test_a_build_asks_before_it_copies(corpora: dict[tuple[str, str], Corpus], tmp_path: Path, modules: str) -> None:
    workshop = make_pair_workshop(tmp_path, "bart")
    corpus, said = corpora["english", "french"], workshop.recipe["experts"]
    for expert, pairs in zip(said, (corpus["trac"], corpus["wagtail"], swapped(corpus["django"])), strict=True):
        write(tmp_path / f"{expert['name']}.jsonl", pairs)
    workshop.write(mixture={"modules": modules, "router": {"fit": "ngram", "buckets": 64}})
    recipe = parse_recipe(yaml.safe_load((tmp_path / "recipe.yaml").read_text()), where="test")
    if modules == "all":
        build(make_plan(recipe, tmp_path), tmp_path / "OUT")
        return
    with pytest.raises(TextError, match="do not go the same way"):
        build(make_plan(recipe, tmp_path), tmp_path / "OUT")
    assert not (tmp_path / "OUT").exists()
