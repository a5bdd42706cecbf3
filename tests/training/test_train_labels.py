"""`modekit train`: texts that are read with tags, labels that are drawn anew, and shares of text of no domain."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Workshop
from labelled import make_labelled
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.cli.training import train_words
from modekit.errors import TextError, TrainingError
from modekit.evaluation.domains import Domain, score_domain
from modekit.loaded.load import load_model
from modekit.run import QUIET
from modekit.text.sequences import TokenSequence
from modekit.training.batches import Batches, DomainSequences, plan_parts, shares
from modekit.training.end_to_end import packs
from modekit.training.losses import GENERIC
from modekit.training.objective import Objective, make_teachers
from modekit.training.settings import TrainSettings, checked_settings, given_settings
from modekit.training.texts import read_texts
from modekit.training.train import train
from trained import short_settings

pytestmark = pytest.mark.filterwarnings("ignore")
TAGS = tuple(range(96, 99))
ROUTED = {"method": "routing", "top_k": 2, "router": {"fit": "random"}}
DECODERS = {"modules": "decoder", "top_k": 1, "router": {"fit": "lexical", "orders": [1, 2], "buckets": 512}}
COMMON = {"always_on": {"expert": "base", "weight": 0.5, "apart": True}}


@pytest.fixture(scope="module")
def tagged_workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Base and one expert per domain, with a tag for each domain."""
    return make_labelled(tmp_path_factory.mktemp("tagged"))


def settings(**said: Any) -> TrainSettings:
    return short_settings(**{"sequence_length": 48, **said})


# Which labels are drawn.


def long_corpora(expert: int = 1) -> list[DomainSequences]:
    return [DomainSequences("law", expert, [TokenSequence(tuple(range(3, 13)))] * 500)]


@pytest.mark.parametrize("to", [None, "half", "all", "others", "generic"])
def test_labels_become_what_is_asked_as_often_as_asked(to: str | None) -> None:
    said = settings(losses={"label": 1.0}, randomise=0.3, batch_tokens=1000, **({"randomise_to": to} if to else {}))
    parts = plan_parts(long_corpora(), said, steps=400, experts=4, parts=1, pack=True)
    labels = [draw.label for part in parts for row in part.rows for draw in row]
    assert len(labels) >= 40_000
    rates = {label: count / len(labels) for label, count in Counter(labels).items()}
    wanted = {
        "half": {1: 0.7, GENERIC: 0.15, 0: 0.05, 2: 0.05, 3: 0.05},
        "all": {1: 0.775, 0: 0.075, 2: 0.075, 3: 0.075},
        "others": {1: 0.7, 0: 0.1, 2: 0.1, 3: 0.1},
        "generic": {1: 0.7, GENERIC: 0.3},
    }[to or "half"]
    assert rates == pytest.approx(wanted, abs=0.01)
    again = plan_parts(long_corpora(), said, steps=400, experts=4, parts=1, pack=True)
    assert parts == again


@pytest.mark.parametrize(
    ("changes", "domains"),
    [({"mix": "proportional"}, [0.8, 0.2]), ({}, [0.5, 0.5])],
)
def test_generic_text_has_its_share_beside_domains_of_any_mix(
    tmp_path: Path, changes: dict[str, Any], domains: list[float]
) -> None:
    """The share from the command line, the mix from a file; so many tokens are read, short sets again and again."""
    (tmp_path / "train.yaml").write_text(json.dumps({**changes, "batch_tokens": 1000}))
    said = given_settings(train_words(["generic=x", "generic_share=0.3"]), tmp_path / "train.yaml")
    made = [
        DomainSequences(name, place, [TokenSequence(tuple(range(3, 13)))] * count)
        for name, place, count in (("law", 0, 80), ("code", 1, 20), ("(generic)", GENERIC, 7))
    ]
    wanted = [*(0.7 * share for share in domains), 0.3]
    assert shares(made, said) == pytest.approx(wanted)
    parts = plan_parts(made, said, steps=60, experts=2, parts=1, pack=True)
    read = Counter(draw.corpus for part in parts for row in part.rows for draw in row)
    assert [read[place] / sum(read.values()) for place in range(3)] == pytest.approx(wanted, abs=0.01)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"randomise": 0.2, "randomise_to": "all"}, "without effect here: randomise"),
        (
            {"randomise": 0.2, "losses": {"lm": 1.0, "forward_kl": 0.1}, "teacher": "x"},
            "effect here: randomise; .* add .* tags, ",
        ),
        ({"generic_share": 0.2}, "without effect here: generic_share"),
    ],
)
def test_settings_that_are_wrong_or_dead_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(TrainingError, match=words):
        checked_settings(values, TrainSettings, where="test")


# Tags.


@pytest.mark.parametrize("to", ["others", "generic"])
def test_a_sequence_is_read_with_the_tag_of_its_label(tagged_workshop: Workshop, tmp_path: Path, to: str) -> None:
    """The tokens, their places and what is predicted, row by row; and the loss is that of the sequences one by one."""
    checkpoint = open_checkpoint(tagged_workshop.build(to, mixture=ROUTED))
    said = settings(
        tags=True,
        randomise=0.5,
        randomise_to=to,
        generic=[str(tagged_workshop.root / "text" / "code.jsonl")],
        generic_share=0.3,
    )
    corpora = [text.corpus for text in read_texts(checkpoint, said, {}, tmp_path, run=QUIET)]
    assert [corpus.tags for corpus in corpora] == [TAGS, TAGS, TAGS, ()]
    for corpus in corpora[:3]:
        assert {sequence.ids[sequence.tag] for sequence in corpus.sequences} == {TAGS[corpus.expert]}
    assert all(sequence.tag is None for sequence in corpora[3].sequences)
    model = load_model(checkpoint.folder)
    for packed in (True, False):
        parts = plan_parts(corpora, said, steps=1, experts=3, parts=1, pack=packed)
        item = Batches(corpora, parts)[0]
        assert check_rows(corpora, parts[0].rows, item) >= 3
        objective = Objective(model, checkpoint, said, teachers=[], train_top_k=None, packed=packed)
        with torch.no_grad():
            found = float(objective(**item))
        read = [corpora[draw.corpus].read_as(draw.sequence, draw.label) for row in parts[0].rows for draw in row]
        assert found == pytest.approx(score_domain(model, Domain("all", None, read), lambda _: None).loss, rel=1e-4)
        assert int(item["targets"]) == sum(sequence.scored for sequence in read)


def check_rows(corpora: list[DomainSequences], rows: Any, item: dict[str, torch.Tensor]) -> int:
    """Compare every sequence of some rows with its own; how many had their label changed."""
    changed = 0
    for number, row in enumerate(rows):
        start = 0
        for draw in row:
            corpus = corpora[draw.corpus]
            own = list(corpus.sequences[draw.sequence].ids)
            rest = own[1:] if corpus.tags else own
            tag = [TAGS[draw.label]] if corpus.tags and draw.label != GENERIC else []
            here = slice(start, start + len(tag) + len(rest))
            assert item["input_ids"][number, here].tolist() == [*tag, *rest]
            silent = item["silent"][number, here].tolist()
            assert silent == [bool(tag) and place == 1 for place in range(len(silent))]
            first = int(corpus.starts[draw.sequence]) + (len(own) - len(tag) - len(rest))
            assert item["position"][number, here].tolist() == list(range(first, first + len(silent)))
            assert set(item["labels"][number, here].tolist()) == {draw.label}
            changed += draw.label != corpus.expert
            start = here.stop
    return changed


def test_a_teacher_is_asked_about_what_is_read(tagged_workshop: Workshop, tmp_path: Path) -> None:
    """One teacher of all domains, which is the mixture with one expert forced: it has nothing to teach that expert's model."""
    checkpoint = open_checkpoint(
        tagged_workshop.build("taught", mixture={"modules": "decoder", "top_k": 1, "router": DECODERS["router"]})
    )
    said = settings(tags=True, losses={"forward_kl": 1.0}, teacher="law", what=["all"])
    corpora = [text.corpus for text in read_texts(checkpoint, said, {}, tmp_path, run=QUIET)]
    teachers = make_teachers(checkpoint, corpora, tmp_path / "kept", tagged_workshop.root / "law", run=QUIET)
    parts = plan_parts(corpora, said, steps=1, experts=3, parts=1, pack=False)
    model = load_model(tagged_workshop.root / "law")
    item = Batches(corpora, parts)[0]
    with torch.no_grad():
        logits = model(item["input_ids"], attention_mask=item["real"].long()).logits
    for number, (draw,) in enumerate(parts[0].rows):
        real = item["real"][number]
        taught = teachers[draw.corpus].logits(item["position"][number][real], torch.device("cpu"))  # type: ignore[union-attr]
        assert torch.allclose(taught, logits[number][real], atol=2e-2 * float(logits.abs().max()))


def test_the_table_shows_the_mixture_with_the_right_tag_alone(tagged_workshop: Workshop) -> None:
    checkpoint = open_checkpoint(tagged_workshop.build("table", mixture=ROUTED))
    done = train(checkpoint, settings(tags=True, what=["all"]), evaluate_tokens=300)
    assert done.results is not None
    names = {row.name for row in done.results.rows}
    assert {"mixture, right tag before", "mixture, right tag"} <= names and not any("wrong" in name for name in names)


def test_a_mixture_without_tags_is_told_so(workshop: Workshop, tagged_workshop: Workshop) -> None:
    with pytest.raises(TrainingError, match="no tag for medicine, law, code"):
        train(open_checkpoint(workshop.build()), settings(tags=True))
    experts = [*tagged_workshop.recipe["experts"][:2], {"name": "general", "model": "base", "text": "./text/code.jsonl"}]
    other = open_checkpoint(tagged_workshop.build("other", experts=experts, mixture=ROUTED))
    with pytest.raises(TrainingError, match="no tag for general"):
        train(other, settings(tags=True))
    chats = tagged_workshop.root / "chat.jsonl"
    chats.write_text("".join(json.dumps({"messages": [{"role": "user", "content": f"say {n}"}]}) + "\n" for n in range(40)))
    checkpoint = open_checkpoint(tagged_workshop.build("chats", mixture=ROUTED))
    with pytest.raises(TextError, match="a conversation has no place for a tag"):
        train(checkpoint, settings(tags=True), texts={"law": [str(chats)]})


# Labels that decide the expert.


def joint(**said: Any) -> TrainSettings:
    return settings(**{"regime": "joint", "batch_tokens": 64, "sequence_length": 32, "backbone_learning_rate": 1e-2, **said})


def joint_mixture(workshop: Workshop, name: str, **said: Any) -> Checkpoint:
    return open_checkpoint(workshop.build(name, mixture={**DECODERS, **said}))


def test_a_step_has_one_label_which_its_expert_takes(tagged_workshop: Workshop) -> None:
    checkpoint, said = joint_mixture(tagged_workshop, "steps"), joint(tags=True, randomise=0.4, randomise_to="others")
    corpora = [text.corpus for text in read_texts(checkpoint, said, {}, tagged_workshop.root, run=QUIET)]
    parts = plan_parts(corpora, said, steps=8000, experts=3, parts=1, pack=True)
    labels = [{draw.label for row in part.rows for draw in row} for part in parts]
    assert all(each == {part.expert} for each, part in zip(labels, parts, strict=True))
    own = [corpora[part.rows[0][0].corpus].expert == part.expert for part in parts]
    assert sum(own) / len(own) == pytest.approx(0.6, abs=0.01)
    batches = Batches(corpora, parts)
    for number in range(12):
        item = batches[number]
        assert {TAGS.index(each) for each in item["input_ids"].flatten().tolist() if each in TAGS} == {parts[number].expert}


@pytest.mark.parametrize("to", ["others", "generic"])
def test_the_expert_of_a_drawn_label_learns_and_no_other(tagged_workshop: Workshop, to: str) -> None:
    """Text of law alone, whose label is nearly always drawn anew: law's own expert has nothing of it."""
    checkpoint = joint_mixture(tagged_workshop, f"learns-{to}", **COMMON)
    said = joint(randomise=0.999, randomise_to=to)
    law = [text.corpus for text in read_texts(checkpoint, said, {}, tagged_workshop.root, run=QUIET)][1:2]
    parts = plan_parts(law, said, steps=3, experts=3, parts=1, pack=packs(checkpoint))
    model = load_model(checkpoint.folder)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".router." not in name)
    objective = Objective(model, checkpoint, said, teachers=[], train_top_k=None, packed=packs(checkpoint))
    batches = Batches(law, parts)
    for number in range(3):
        objective(**batches[number]).backward()
    moved = {name.partition(".experts.")[2].partition(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    wanted = {str(part.expert) for part in parts} if to == "others" else set()
    assert moved - {""} == wanted and "1" not in moved
    assert any(".base." in name and p.grad is not None for name, p in model.named_parameters())
