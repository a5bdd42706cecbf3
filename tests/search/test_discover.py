"""Domains without labels: planted ones are found, as many as there are, whatever the order; every document is there, whole."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_matrix

import modekit.search.discover.discover as discover_module
from command_line import ended
from conftest import Workshop, make_workshop
from modekit.checkpoint.checkpoint import open_checkpoint
from modekit.demo.text import DOMAINS, unpack_text
from modekit.errors import TextError, UnsupportedError
from modekit.recipes.read import parse_recipe
from modekit.run import QUIET
from modekit.search.discover.discover import Unlabelled, discover, shared_experts
from modekit.search.discover.documents import UnlabelledDocuments, describe_groups, name_of, rare_words, word_rows, words_of
from modekit.search.discover.grouping import WORTH, choose, cluster, log_likelihood, try_numbers, word_model, word_shares
from modekit.search.discover.result import Coverage, DiscoverSettings, Discovery, DocumentGroup
from modekit.text.document import Conversation, text_of
from modekit.text.documents import read_documents
from refusal import refuse, tree, without

GIVEN = DiscoverSettings(domains=3)


def planted(domains: int, documents: int, *, seed: int = 0, words: int = 30) -> dict[str, str]:
    """Document -> domain. Each domain draws from words of its own, and all from common ones."""
    draw = random.Random(seed)

    def vocabulary(letter: str, size: int) -> list[str]:
        return [letter + "".join(draw.choices("abcdefghij", k=6)) for _ in range(size)]

    common, found = vocabulary("z", 60), {}
    for domain in range(domains):
        own = vocabulary("kmnpqrst"[domain], 120)
        for _ in range(documents):
            found[" ".join([*draw.choices(own, k=words), *draw.choices(common, k=words)])] = f"domain{domain}"
    return found


def write_documents(path: Path, documents: Sequence[str], seed: int = 0) -> Path:
    """In an order that the seed gives."""
    lines = [json.dumps({"text": document}) for document in documents]
    random.Random(seed).shuffle(lines)
    path.write_text("\n".join(lines) + "\n")
    return path


def purity(out: Path, labels: dict[str, str]) -> float:
    """Share of documents that are of the domain which most of their group are of; every document once."""
    right = found = 0
    for file in sorted(out.glob("*.jsonl")):
        own = [labels[json.loads(line)["text"]] for line in file.read_text().splitlines()]
        right += max(map(own.count, set(own)))
        found += len(own)
    assert found == len(labels)
    return right / found


def found_in(text: Path, out: Path | None = None, settings: DiscoverSettings = GIVEN) -> Discovery:
    return discover(Unlabelled([str(text)], text.parent), settings, out=out)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_the_demos_domains_are_found_and_counted(tmp_path: Path, seed: int) -> None:
    shipped = unpack_text(tmp_path / "demo")
    labels = {document: name for name in DOMAINS for document in read_documents([str(shipped[name])], root=tmp_path, where="")}
    text = write_documents(tmp_path / "shuffled.jsonl", list(labels), seed)
    discovery = found_in(text, tmp_path / "OUT", DiscoverSettings(seed=seed))
    assert len(discovery.groups) == len(DOMAINS) and len(discovery.tried) == 12
    assert purity(tmp_path / "OUT", labels) >= 0.9
    telling = {"medicine": "disease", "law": "license", "science": "earth", "code": "def"}
    assert {word for each in discovery.groups for word in each.words} >= set(telling.values())


@pytest.mark.parametrize("domains", [2, 3, 5])
def test_as_many_as_were_planted_are_proposed(tmp_path: Path, domains: int) -> None:
    labels = planted(domains, 60, seed=domains)
    discovery = found_in(write_documents(tmp_path / "a.jsonl", list(labels)), tmp_path / "OUT", DiscoverSettings(most=7))
    assert len(discovery.groups) == domains
    assert purity(tmp_path / "OUT", labels) == 1.0


def test_text_of_one_kind_is_one_domain(tmp_path: Path) -> None:
    text = write_documents(tmp_path / "a.jsonl", list(planted(1, 100)))
    assert [each.documents for each in found_in(text, settings=DiscoverSettings(most=5)).groups] == [100]


def test_the_order_and_the_files_change_nothing_but_the_order(tmp_path: Path) -> None:
    labels = list(planted(3, 40))
    one, two = tmp_path / "one.jsonl", tmp_path / "two"
    write_documents(one, labels, 1)
    two.mkdir()
    for number in range(4):
        write_documents(two / f"{number}.jsonl", labels[number::4], 2 + number)
    groups = []
    for text, out in ((one, tmp_path / "OUT1"), (two, tmp_path / "OUT2")):
        found_in(text, out)
        groups.append({file.name: sorted(file.read_text().splitlines()) for file in out.glob("*.jsonl")})
    assert groups[0] == groups[1] and len(groups[0]) == 3
    first, second = (json.loads((tmp_path / out / "discover.json").read_text()) for out in ("OUT1", "OUT2"))
    assert first.pop("text") != second.pop("text") and first == second


def test_the_same_text_and_seed_give_the_same_bytes(tmp_path: Path) -> None:
    text = write_documents(tmp_path / "a.jsonl", list(planted(3, 40)))
    for out in ("OUT1", "OUT2"):
        found_in(text, tmp_path / out, DiscoverSettings(most=5, seed=7))
    assert tree(tmp_path / "OUT1") == tree(tmp_path / "OUT2")


def test_a_small_sample_groups_all_documents(tmp_path: Path) -> None:
    labels = planted(3, 150)
    text = write_documents(tmp_path / "a.jsonl", list(labels))
    stream = UnlabelledDocuments([str(text)], tmp_path)
    sample = stream.sample(40, 0)
    assert (len(sample.beginnings), sample.documents) == (40, 450)
    assert stream.sample(40, 1).beginnings != sample.beginnings
    found_in(text, tmp_path / "OUT", DiscoverSettings(domains=3, sample=40))
    assert purity(tmp_path / "OUT", labels) > 0.99


def test_documents_stay_whole_and_other_verbs_read_them(tmp_path: Path) -> None:
    labels = list(planted(2, 20))
    long = labels[0] + "\n\n" + " ".join(labels[1:9] * 40)
    said = [{"role": "user", "content": labels[9]}, {"role": "assistant", "content": "né à\u2028<b>\x1b[31m"}]
    records = [{"text": long}, {"text": long}, {"messages": said}, *({"text": each} for each in labels)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    (tmp_path / "b.txt").write_text("kabc plain text of words\n\n" * 300)
    before = read_documents(["a.jsonl", "b.txt"], root=tmp_path, where="")
    discovery = discover(Unlabelled(["a.jsonl", "b.txt"], tmp_path), DiscoverSettings(domains=2), out=tmp_path / "OUT")
    after = read_documents([str(tmp_path / "OUT" / each.file) for each in discovery.groups], root=tmp_path, where="")
    assert before == after and len(long) > 16_384 and long in after
    conversations = [[*map(dict, each.messages)] for each in after if isinstance(each, Conversation)]
    assert conversations == [said]
    assert sum(each.documents for each in discovery.groups) == len(after)
    assert sum(each.characters for each in discovery.groups) == sum(len(text_of(each)) for each in after)
    experts = [{"name": each.name, "model": "base", "text": f"OUT/{each.file}"} for each in discovery.groups]
    assert parse_recipe({"base_model": "base", "experts": experts, "mixture": {"router": {"fit": "random"}}}).names


def test_text_that_changes_meanwhile_is_an_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = write_documents(tmp_path / "a.jsonl", list(planted(3, 20)))
    learn = discover_module.group_documents

    def learns_slowly(*arguments: Any) -> Any:
        found = learn(*arguments)
        write_documents(text, list(planted(3, 20, seed=1)))
        return found

    monkeypatch.setattr(discover_module, "group_documents", learns_slowly)
    with pytest.raises(TextError, match="changed while it was read"):
        found_in(text, tmp_path / "OUT")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_likelihoods_are_those_of_the_mixture_of_groups() -> None:
    """Against sums written out: a document is drawn from one group, each of its units by that group's shares."""
    draw = np.random.default_rng(0)
    dense = (draw.random((9, 5)) < 0.6).astype(np.float32)
    dense[0] = 1
    rows, labels = csr_matrix(dense), np.array([0, 1, 0, 1, 1, 0, 2, 2, 1])
    shares = word_shares(rows)
    found = word_model(rows, labels, shares)
    wanted = 0.0
    for document in dense:
        likelihood = 0.0
        for number in range(3):
            own = dense[labels == number].sum(axis=0)
            probabilities = (own + 300 * shares) / (own.sum() + 300)
            likelihood += (labels == number).mean() * math.prod(probabilities[document > 0].tolist())
        wanted += math.log(likelihood)
    assert log_likelihood(found, rows) == pytest.approx(wanted)


def test_the_best_of_several_beginnings_is_the_likeliest() -> None:
    documents = list(planted(4, 30, seed=3))
    rows = word_rows(documents)
    rows = rows[:, rare_words(rows)]
    points = np.asarray(np.random.default_rng(0).normal(size=(len(documents), 6)))

    def likelihood(seed: int) -> float:
        found = cluster(points, rows, 4, word_shares(rows), seed)
        assert found is not None and (found.nearest(points) == found.labels).all()
        model = word_model(rows, found.labels, word_shares(rows))
        of = model.predict_joint_log_proba(rows) - model.class_log_prior_
        return float(of[np.arange(len(documents)), found.labels].sum())

    several = likelihood(0)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("modekit.search.discover.grouping.STARTS", 1)
        alone = [likelihood(seed) for seed in range(10)]
    assert several == max(alone) > min(alone)


def test_a_number_is_chosen_by_what_its_groups_are_worth() -> None:
    assert choose([-9.0, -9.0 + WORTH / 2]) == 1
    assert choose([-9.0, -8.8, -8.79, -8.5, -8.46]) == 4
    assert choose([-9.0, -8.0, -8.0 + WORTH / 2, -8.0 + 1.9 * WORTH]) == 2


def test_no_more_numbers_are_tried_than_there_are_places() -> None:
    documents = ["alpha beta gamma", "delta epsilon zeta"] * 10
    rows = word_rows(documents)
    tried = try_numbers(np.array([[1.0, 0.0], [0.0, 1.0]] * 10), rows[:, rare_words(rows)], 6, 0, lambda done: None)
    assert len(tried) == 2


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A mixture of medicine and law whose router reads tokens, one whose does not, and text of three domains."""
    made = make_workshop(tmp_path_factory.mktemp("discover"), num_hidden_layers=1)
    two = made.recipe["experts"][:2]
    router = {"fit": "ngram", "order": 4}
    made.build("TEXT", experts=two, mixture={"method": "routing", "top_k": 1, "router": router}, output={"format": "modekit"})
    made.build("RANDOM", experts=two)
    return made


def test_the_domain_that_a_mixture_lacks_comes_next(shop: Workshop, tmp_path: Path) -> None:
    unlabelled = Unlabelled([str(shop.root / "text")], tmp_path, open_checkpoint(shop.root / "TEXT"))
    discovery = discover(unlabelled, GIVEN, out=tmp_path / "OUT")
    served = {"fever": "medicine", "clause": "law"}
    for each in discovery.groups:
        assert each.served is not None and each.served.documents == 60
        assert sum(each.served.experts.values()) == pytest.approx(1)
        expert = next((expert for word, expert in served.items() if word in each.words), None)
        if expert is None:
            assert "yield" in each.words and discovery.next == each.name and each.served.served < 0.5
        else:
            assert each.served.experts[expert] == 1 and each.served.served > 0.9 and each.served.expert == expert
    assert discovery.mixture == "TEXT"
    assert Discovery.model_validate_json((tmp_path / "OUT" / "discover.json").read_text()) == discovery
    assert not discovery.notes


def test_an_expert_that_serves_two_groups_is_named() -> None:
    served = Coverage(documents=10, experts={"law": 1.0}, certainty=0.95, served=0.9, expert="law")
    groups = [
        DocumentGroup(name=name, file="", documents=1, characters=1, words=[], served=of)
        for name, of in (("1-clause", served), ("2-def", served), ("3-fever", None))
    ]
    (note,) = shared_experts(groups)
    assert "'law' serves 1-clause, 2-def" in note


def test_mixtures_that_cannot_say_it(shop: Workshop, tmp_path: Path) -> None:
    text = [str(shop.root / "text")]
    with pytest.raises(UnsupportedError, match="router needs the model"):
        discover(Unlabelled(text, tmp_path, open_checkpoint(shop.root / "RANDOM")), GIVEN)


def test_words_of_any_script() -> None:
    assert words_of("The naïve user_2's self.x = Größe!") == ["the", "naïve", "user", "self", "größe"]
    assert words_of("我爱北京 ok") == ["ok", "我爱", "爱北", "北京"]
    assert words_of("x 1 ? \x1b[31m") == []
    assert max(map(len, words_of("a" * 100))) == 24


@pytest.mark.parametrize("words", [["[red]", "\x1b[31m", "../../etc"], ["我爱", "爱北"], ["con", "nul"], ["é" * 90], []])
def test_names_are_those_of_files_and_experts(words: list[str]) -> None:
    name = name_of(3, words)
    assert re.fullmatch(r"3(-[a-z]{1,16}){0,3}", name)


def test_words_tell_a_group_from_the_others() -> None:
    documents = ["the fever rose", "the fever fell", "the court rose", "the court sat"]
    first, second = describe_groups(documents, np.array([0, 0, 1, 1]), 2)
    assert (first[0], second[0]) == ("fever", "court") and "the" not in (first[0], second[0])


def test_rare_words_count_where_there_are_enough() -> None:
    rows = word_rows(list(planted(3, 200)))
    kept = rare_words(rows)
    found = np.asarray(rows[:, kept].sum(axis=0)).ravel()
    assert found.min() >= 2 and found.max() <= 0.2 * 600
    few = word_rows(["fever dose", "fever artery", "court deed", "court dose"])
    assert len(rare_words(few)) == 3  # what stands in one document alone says nothing


def refused(tmp_path: Path, *arguments: object) -> str:
    """The command must refuse and leave everything as it was."""
    before = tree(tmp_path)
    message = refuse("discover", tmp_path / "OUT", *arguments)
    assert tree(tmp_path) == before
    return message


def test_wrong_text_is_one_error(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    assert "the folder holds no text" in refused(tmp_path, "--text", folder)
    assert "does not exist" in refused(tmp_path, "--text", "./nothing")
    (folder / "a.txt").write_text("  \n\n ")
    assert "the text is empty" in refused(tmp_path, "--text", folder)
    (folder / "a.txt").write_text("one document of some words")
    assert "there is nothing to group" in refused(tmp_path, "--text", folder)
    (folder / "b.jsonl").write_text('{"text": "another one of some words"}\n{"text": "1 2 3"}\n')
    message = refused(tmp_path, "--text", folder, "--domains", 4)
    assert "cannot be split into so many domains" in message and "3 documents" in message
    (folder / "b.jsonl").write_text('{"text": "1 2 3"}\n')
    assert "nothing in common" in refused(tmp_path, "--text", folder, "--domains", 2)
    (folder / "b.jsonl").write_text('{"no": 1}\n')
    assert "b.jsonl:1" in refused(tmp_path, "--text", folder)
    (folder / "b.jsonl").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in refused(tmp_path, "--text", folder)


def test_documents_alike_in_all_that_counts_are_not_told_apart(tmp_path: Path) -> None:
    text = write_documents(
        tmp_path / "a.jsonl", [f"{number} fever artery" for number in range(9)] + ["court deed", "deed court"]
    )
    message = refused(tmp_path, "--text", text, "--domains", 3)
    assert "cannot be split into so many domains" in message and "11 documents, in 2 places" in message


def test_wrong_settings_are_one_error(tmp_path: Path, shop: Workshop) -> None:
    text, base = shop.root / "text", shop.root / "base"
    for option, number in (("--domains", 1), ("--domains", -3), ("--domains", 65), ("--sample", 1)):
        code, stdout, stderr = ended("discover", tmp_path / "OUT", "--text", text, option, number)
        assert (code, stdout) == (2, "") and f"Invalid value for '{option}'" in stderr and not (tmp_path / "OUT").exists()
    assert "give --domains" in refused(tmp_path, "--text", text, "--most", 5)
    assert "router needs the model" in refused(tmp_path, "--text", text, "--mixture", shop.root / "RANDOM")
    assert "modekit.json is missing" in refused(tmp_path, "--text", text, "--mixture", base)


def test_the_output_is_replaced_only_where_it_is_modekits(tmp_path: Path) -> None:
    text = write_documents(tmp_path / "a.jsonl", list(planted(3, 20)))
    asked = ("--text", text, "--domains", 3)
    found_in(text, tmp_path / "OUT")
    assert "the output folder exists" in refused(tmp_path, *asked)
    discover(Unlabelled([str(text)], tmp_path), DiscoverSettings(domains=2), out=tmp_path / "OUT", replace="modekit's own")
    assert len(list((tmp_path / "OUT").glob("*.jsonl"))) == 2
    (tmp_path / "OUT" / "mine.txt").write_text("mine")
    assert "did not write" in refused(tmp_path, *asked, "--overwrite")
    assert "lies in" in refuse("discover", tmp_path / "OUT" / "in", "--text", tmp_path / "OUT", "--domains", 2)


def test_without_scikit_learn_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without("sklearn", "modekit.search.discover", monkeypatch)
    assert "pip install 'modekit[discover]'" in refuse("discover", "--text", tmp_path)


def test_without_a_folder_nothing_is_written(tmp_path: Path) -> None:
    text = write_documents(tmp_path / "a.jsonl", list(planted(2, 30)))
    before = tree(tmp_path)
    assert "a FOLDER to write to" in refuse("discover", "--text", text, "--overwrite")
    discovery = discover(Unlabelled([str(text)], tmp_path), DiscoverSettings(most=4), run=QUIET)
    assert tree(tmp_path) == before and sorted(each.documents for each in discovery.groups) == [30, 30]
