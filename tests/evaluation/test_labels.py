"""Labels at test time: what a label is worth by gate and by tag, against passes that are run by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import modekit.evaluation.rows as rows_module
from command_line import modekit
from conftest import DOMAINS, Workshop
from labelled import LABEL, STRANGER, make_labelled, of_adapters
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.errors import MismatchError, TextError
from modekit.evaluation.domains import Domain, held_out_domains, held_out_texts, score_domain
from modekit.evaluation.evaluate import evaluate
from modekit.evaluation.inspection.inspect import inspect_text
from modekit.evaluation.results import Results, Score
from modekit.evaluation.rows import label_places, label_tags, with_tag
from modekit.loaded.load import load_model, load_tokenizer
from modekit.loaded.shapes import mixture_of
from modekit.recipes.read import parse_recipe
from modekit.report.page import write_report
from modekit.text.sequences import encode
from modekit.text.tags import labels_of, tagged

SIZES: dict[str, Any] = {"tokens_per_domain": 250, "sequence_length": 40}
ROWS = ["mixture, right label", "mixture, wrong label"]
TAG_ROWS = [f"{model}, {told} tag" for model in ("base", "mixture") for told in ("right", "wrong")]
RIGHT = {"medicine": 0, "law": 1, "code": 2, LABEL: 1}
WRONG = {"medicine": 1, "law": 2, "code": 0, LABEL: 2, STRANGER: 0}
KINDS: dict[str, dict[str, Any]] = {
    "native": {"output": {"format": "plain"}},
    "adapters": {"output": {"format": "modekit"}},
}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return make_labelled(tmp_path_factory.mktemp("labelled"))


@pytest.fixture(scope="module", params=KINDS)
def scored(request: pytest.FixtureRequest, shop: Workshop) -> tuple[Checkpoint, Results]:
    changes = dict(KINDS[request.param])
    if request.param == "adapters":
        changes["experts"] = of_adapters(shop)
    checkpoint = open_checkpoint(shop.build(request.param.replace(" ", "-"), **changes))
    return checkpoint, evaluate(checkpoint, **SIZES, labels="gate")


def by_hand(checkpoint: Checkpoint, domain: Domain, expert: int | None) -> Score:
    model = load_model(checkpoint.folder)
    if expert is None:
        return score_domain(model, domain, lambda _: None)
    with mixture_of(model, checkpoint).forced(expert):
        return score_domain(model, domain, lambda _: None)


def same(first: Score, second: Score) -> bool:
    """Bit for bit, but for what is made of it and other rows."""
    return (first.loss, first.blocks) == (second.loss, second.blocks)


def test_by_gate_a_label_is_a_forced_pass(scored: tuple[Checkpoint, Results]) -> None:
    checkpoint, results = scored
    domains = {domain.name: domain for domain in held_out_domains(checkpoint, **SIZES)}
    assert [row.name for row in results.rows if row.kind == "label"] == ROWS
    for told, places in (("right", RIGHT), ("wrong", WRONG)):
        row = results.row(f"mixture, {told} label")
        assert set(row.scores) == set(places)  # what nobody knows has no right label
        for name, place in places.items():
            assert same(row.scores[name], by_hand(checkpoint, domains[name], place)), (told, name)
            assert row.scores[name].loss != results.row("mixture").scores[name].loss
    for name in DOMAINS:
        assert results.row(ROWS[0]).scores[name] == results.row("oracle").scores[name]
        assert results.row(ROWS[0]).scores[name].loss != results.row(ROWS[1]).scores[name].loss
    assert same(results.row("mixture").scores[STRANGER], by_hand(checkpoint, domains[STRANGER], None))


def test_what_a_label_is_worth_is_said_in_a_line(scored: tuple[Checkpoint, Results]) -> None:
    _, results = scored
    none, right, wrong = (sum(results.row(name).scores[each].loss for each in DOMAINS) / 3 for name in ("mixture", *ROWS))
    for name, loss in zip(ROWS, (right, wrong), strict=True):
        (said,) = (note for note in results.notes if note.startswith(f"{name}: a gain of "))
        assert f"{none - loss:+.3f} ± 0." in said


def test_rows_are_taken_over_but_never_for_another_label(
    shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(shop.build("CACHED", output={"format": "plain"}))
    first = evaluate(checkpoint, **SIZES, labels="gate")
    loaded: list[Path] = []
    real = rows_module.load_model
    monkeypatch.setattr(rows_module, "load_model", lambda folder, **k: (loaded.append(folder), real(folder, **k))[1])
    assert evaluate(checkpoint, **SIZES, labels="gate").rows == first.rows and not loaded
    assert first.belongs_to(checkpoint)
    assert Results.from_data(json.loads(json.dumps(first.as_data()))).rows == first.rows
    # Under another label "court" is another expert's text, and what was run for law's is not taken.
    experts = [{key: value for key, value in each.items() if key != "labels"} for each in shop.recipe["experts"]]
    experts[2]["labels"] = [LABEL]
    other = open_checkpoint(shop.build("CACHED-TOO", output={"format": "plain"}, experts=experts))
    second = evaluate(other, **SIZES, labels="gate", known=first)
    assert second.row("mixture, right label").scores["law"] == first.row("mixture, right label").scores["law"]
    assert second.row("mixture, right label").scores[LABEL] != first.row("mixture, right label").scores[LABEL]


def test_by_tag_the_token_of_a_label_stands_before_the_text(shop: Workshop) -> None:
    checkpoint = open_checkpoint(shop.build("TAG", **KINDS["native"]))
    unlabelled = evaluate(checkpoint, **SIZES)
    results = evaluate(checkpoint, **SIZES, labels="tag")
    assert [row.name for row in results.rows if row.kind == "label"] == TAG_ROWS
    assert results.rows[: len(unlabelled.rows)] == unlabelled.rows  # tags change no other row
    tokenizer = load_tokenizer(checkpoint.folder)
    models = {"mixture": load_model(checkpoint.folder), "base": load_model(shop.root / "base")}
    domains = {domain.name: domain for domain in held_out_domains(checkpoint, **SIZES)}
    for held in held_out_texts(checkpoint):
        domain = domains[held.name]
        for told, places in (("right", RIGHT), ("wrong", WRONG)):
            if held.name not in places:
                assert held.name not in results.row(f"mixture, {told} tag").scores
                continue
            documents = [tagged(document, DOMAINS[places[held.name]]) for document in held.documents]
            read = encode(tokenizer, documents, max_tokens=10_000, sequence_length=41)[: len(domain.sequences)]
            if sum(each.size for each in domain.sequences) < 245:  # else the last piece was cut
                assert list(read) == with_tag(tokenizer, domain.sequences, DOMAINS[places[held.name]])
            assert all(each.tag == 0 for each in read)
            shown = [each.with_tag(None).ids for each in read[:-1]] == [each.ids for each in domain.sequences[:-1]]
            assert shown and sum(each.scored for each in read[:-1]) == sum(each.scored for each in domain.sequences[:-1])
            for name, model in models.items():
                score, total = results.row(f"{name}, {told} tag").scores[held.name], 0.0
                for piece in with_tag(tokenizer, domain.sequences, DOMAINS[places[held.name]]):
                    ids = torch.tensor([piece.ids])
                    with torch.inference_mode():
                        logits = model(input_ids=ids).logits[0, 1:-1]  # neither the tag nor the first token is predicted
                    total += float(torch.nn.functional.cross_entropy(logits, ids[0, 2:], reduction="sum"))
                assert score.loss == pytest.approx(total / domain.scored_tokens, rel=1e-5), (name, told, held.name)
                assert score.loss != results.row(name).scores[held.name].loss
    assert results.row("base, right tag").active_parameters == checkpoint.parameters.dense
    assert any(note.startswith("base, right tag: a gain of ") for note in results.notes)


def test_a_row_without_tags_has_none_where_texts_have_their_own(
    shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a tag is worth is told against it, and not against the text as it is; it is taken over as any row."""
    checkpoint = with_own_tags(shop, tmp_path, "OWN")
    results = evaluate(checkpoint, **SIZES, labels="tag")
    assert [row.name for row in results.rows if row.kind == "label"] == [
        f"{model}, {told} tag" for model in ("base", "mixture") for told in ("right", "wrong", "no")
    ]
    domains = {each.name: each for each in held_out_domains(checkpoint, **SIZES)}
    assert all(each.tag == 0 for each in domains["law"].sequences)
    tokenizer = load_tokenizer(checkpoint.folder)
    for name, folder in (("mixture", checkpoint.folder), ("base", shop.root / "base")):
        none, model = results.row(f"{name}, no tag"), load_model(folder)
        for domain in domains.values():
            unlabelled = replace(domain, sequences=with_tag(tokenizer, domain.sequences, None))
            assert same(none.scores[domain.name], score_domain(model, unlabelled, lambda _: None)), (name, domain.name)
        as_it_is, right = results.row(name).scores["law"], results.row(f"{name}, right tag").scores["law"]
        assert same(as_it_is, right) and as_it_is.loss != none.scores["law"].loss
        assert all(same(none.scores[other], results.row(name).scores[other]) for other in {*domains} - {"law"})
        means = [results.row(f"{name}, {told} tag").mean_loss(DOMAINS) or 0.0 for told in ("right", "wrong", "no")]
        for told, mean in zip(("right", "wrong"), means, strict=False):
            (line,) = (each for each in results.notes if each.startswith(f"{name}, {told} tag: a gain of "))
            assert f"{means[2] - mean:+.3f} ±" in line
    loaded: list[Path] = []
    monkeypatch.setattr(rows_module, "load_model", lambda folder, **_: loaded.append(folder))
    assert evaluate(checkpoint, **SIZES, labels="tag").rows == results.rows and not loaded


def with_own_tags(shop: Workshop, folder: Path, name: str) -> Checkpoint:
    """A mixture whose text of law begins with its tag, in a file of that name in `folder`."""
    documents = (json.loads(line)["text"] for line in (shop.root / "text" / "law.jsonl").read_text().splitlines())
    (folder / "law.jsonl").write_text("\n".join(json.dumps({"text": tagged(each, "law")}) for each in documents))
    experts = [
        {**each, "text": str(folder / "law.jsonl")} if each["name"] == "law" else each for each in shop.recipe["experts"]
    ]
    return open_checkpoint(shop.build(name, output={"format": "plain"}, experts=experts))


def test_a_label_that_has_a_tag_of_its_own_is_told_by_that(shop: Workshop) -> None:
    recipe = parse_recipe({**shop.recipe, "mixture": {"router": {"fit": "random"}}})
    domains = [Domain(LABEL, None, []), Domain(STRANGER, None, []), Domain("law", 1, [])]
    right, wrong = label_places(domains, recipe)
    assert right == {LABEL: 1, "law": 1} and wrong == {LABEL: 2, STRANGER: 0, "law": 2}
    assert label_tags(right, recipe, DOMAINS) == {LABEL: "law", "law": "law"}
    assert label_tags(right, recipe, [*DOMAINS, LABEL, STRANGER]) == {LABEL: LABEL, "law": "law"}
    assert label_tags(wrong, recipe, [*DOMAINS, LABEL, STRANGER]) == {LABEL: "code", STRANGER: "medicine", "law": "code"}
    alone = parse_recipe(
        {"base_model": "b", "experts": [{"name": "law", "model": "m"}], "mixture": {"router": {"fit": "random"}}}
    )
    assert label_places([Domain("law", 0, []), Domain(STRANGER, None, [])], alone)[1] == {STRANGER: 0}  # there is no other


def test_what_is_refused(shop: Workshop, small_workshop: Workshop, tmp_path: Path) -> None:
    untagged = open_checkpoint(small_workshop.build("NO-TAGS"))
    with pytest.raises(MismatchError, match="no tag for medicine, law, code") as caught:
        evaluate(untagged, **SIZES, labels="tag")
    assert "modekit specialize --tags" in str(caught.value) and not labels_of(load_tokenizer(untagged.folder))
    weights = {"method": "linear", "weights": {"medicine": 1, "law": 2, "code": 1}}
    folded = open_checkpoint(shop.build("FOLDED", mixture=weights, output={"format": "plain"}))
    with pytest.raises(MismatchError, match="no expert is whole in this mixture"):
        evaluate(folded, **SIZES, labels="gate")
    assert "mixture, right tag" in [row.name for row in evaluate(folded, **SIZES, labels="tag").rows]
    talk = [{"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes"}]} for n in range(5)]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, talk)))
    tokenizer = load_tokenizer(folded.folder)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    chats = shop.build("CHATS", eval={"law": "./text/law.jsonl", "chat": str(tmp_path / "chat.jsonl")})
    tokenizer.save_pretrained(chats)
    with pytest.raises(TextError, match="a conversation has no place for a tag"):
        evaluate(open_checkpoint(chats), **SIZES, labels="tag")


@pytest.mark.parametrize("text", ["the deed of a party, in court; " * 4, "    a deed\n  of a party"])
def test_a_long_text_with_a_tag_is_inspected_as_it_is_scored(shop: Workshop, text: str) -> None:
    checkpoint, said = open_checkpoint(shop.build("WINDOWS", output={"format": "plain"})), tagged(text, "law")
    shown = inspect_text(checkpoint, said, sequence_length=17).as_data()
    read = encode(load_tokenizer(checkpoint.folder), [said], max_tokens=9_999, sequence_length=17)
    for name, folder in (("loss", checkpoint.folder), ("base_loss", shop.root / "base")):
        wanted = score_domain(load_model(folder), Domain("law", None, read), lambda _: None).loss
        assert shown[name] == pytest.approx(wanted, rel=1e-5), name
    tags = [place for place, token in enumerate(shown["tokens"]) if token["text"].strip() == "<domain:law>"]
    assert tags == [17 * window for window in range(len(read))]
    silent = {place for place, token in enumerate(shown["tokens"]) if token["loss"] is None}
    assert silent == {*tags, *(place + 1 for place in tags)}
    assert {len(each) for each in shown["weights"]} == {len(shown["tokens"])}


def test_the_command_line(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(shop.build("CLI", output={"format": "plain"}))
    options = ("--tokens", "100", "--sequence-length", "40")
    monkeypatch.setenv("COLUMNS", "80")
    shown = modekit("eval", folder, *options, "--labels", "gate")
    assert "mixture, right label" in shown and "mixture, wrong label" in shown
    table = (Path(folder) / "results" / "eval.md").read_text()
    assert "| mixture, right label |" in table and "mixture, right label: a gain of " in table
    page = write_report(open_checkpoint(Path(folder))).page.read_text()
    assert 'scope="row">mixture, right label<' in page and "mixture, right label: a gain of " in page
    data = json.loads(modekit("eval", folder, *options, "--labels", "tag", "--json"))
    assert [row["name"] for row in data["rows"]][-4:] == TAG_ROWS
    assert "mixture, right label" not in modekit("eval", folder, *options)
