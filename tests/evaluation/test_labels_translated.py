"""Labels of texts that are translated: every row against `generate` itself, greedily and by beams."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from sacrebleu.metrics import BLEU, CHRF
from test_translation import tokenizer_of, writer
from transformers import PreTrainedModel

from command_line import modekit
from conftest import DOMAINS, Workshop
from labelled import LABEL, STRANGER, TAGGED, make_labelled, with_tags
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.evaluation.domains import held_out_texts
from modekit.evaluation.rows import Labels
from modekit.evaluation.translation.evaluate import evaluate_translation
from modekit.evaluation.translation.results import Decoding, TranslationResults, TranslationScore
from modekit.loaded.load import load_model, load_tokenizer
from modekit.text.tags import tag_of

PAIRS, TOKENS = 3, 8


def model_of(seed: int) -> PreTrainedModel:
    model = writer("t5", seed)
    model.resize_token_embeddings(TAGGED, mean_resizing=False)
    return model


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    made = make_labelled(tmp_path_factory.mktemp("translated"), model_of, with_tags(tokenizer_of()))
    for path in (made.root / "text").glob("*.jsonl"):
        said = [json.loads(line)["text"] for line in path.read_text().splitlines()]
        path.write_text("\n".join(json.dumps({"source": text, "target": text[:9]}) for text in said))
    return made


@pytest.fixture(scope="module")
def checkpoint(shop: Workshop) -> Checkpoint:
    return open_checkpoint(shop.build("OUT"))


def run(checkpoint: Checkpoint, beams: int, labels: Labels | None) -> TranslationResults:
    return evaluate_translation(checkpoint, pairs=PAIRS, decoding=Decoding(beams, 2, TOKENS), labels=labels)


@contextmanager
def told(model: Any, label: str | None) -> Iterator[None]:
    if label is not None:
        model.use_expert(label)
    yield
    if label is not None:
        model.use_expert(None)


def by_hand(
    checkpoint: Checkpoint, model: Any, domain: str, beams: int, *, gate: str | None = None, tag: str = ""
) -> TranslationScore:
    """Of sources without a tag of their own, or with the one that is told."""
    tokenizer = load_tokenizer(checkpoint.folder)
    (held,) = (each for each in held_out_texts(checkpoint) if each.name == domain)
    texts = []
    for pair in held.documents[:PAIRS]:
        source = pair.source.removeprefix(f"{tag_of(domain)} ")
        ids = torch.tensor([tokenizer(f"{tag_of(tag)} {source}" if tag else source)["input_ids"]])
        with told(model, gate):
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), num_beams=beams, max_new_tokens=TOKENS)
        texts.append(tokenizer.decode(out[0], skip_special_tokens=True).strip())
    references = [[pair.target for pair in held.documents[:PAIRS]]]
    return TranslationScore(
        BLEU(force=True).corpus_score(texts, references).score, CHRF().corpus_score(texts, references).score
    )


@pytest.mark.slow
def test_by_gate_the_experts_of_the_labels_write(checkpoint: Checkpoint) -> None:
    beams = 2
    results = run(checkpoint, beams, "gate")
    right, wrong = (results.row(f"mixture, {each} label") for each in ("right", "wrong"))
    assert [row.name for row in results.rows][-2:] == [right.name, wrong.name]
    assert {name: right.scores[name] for name in DOMAINS} == results.row("oracle").scores
    model = load_model(checkpoint.folder)
    assert right.scores[LABEL] == by_hand(checkpoint, model, LABEL, beams, gate=LABEL) and STRANGER not in right.scores
    next_one = {"medicine": "law", "law": "code", "code": "medicine", LABEL: "code", STRANGER: "medicine"}
    assert wrong.scores == {name: by_hand(checkpoint, model, name, beams, gate=label) for name, label in next_one.items()}
    assert sum(wrong.scores[name] != right.scores[name] for name in right.scores) > 1
    assert [row.scores for row in run(checkpoint, beams, None).rows] == [row.scores for row in results.rows[:-2]]


def test_by_tag_the_source_begins_with_the_label(checkpoint: Checkpoint, shop: Workshop) -> None:
    beams = 1
    results = run(checkpoint, beams, "tag")
    names = [row.name for row in results.rows]
    assert {f"{model}, {each} tag" for model in ("base", "mixture") for each in ("right", "wrong")} <= set(names)
    models = {"mixture": load_model(checkpoint.folder), "base": load_model(shop.root / "base")}
    tags = {"right": {"code": "code", LABEL: "law"}, "wrong": {"code": "medicine", LABEL: "code", STRANGER: "medicine"}}
    differs = 0
    for name, model in models.items():
        for which, labels in tags.items():
            row = results.row(f"{name}, {which} tag")
            for domain, label in labels.items():
                assert row.scores[domain] == by_hand(checkpoint, model, domain, beams, tag=label), (name, which, domain)
                differs += row.scores[domain] != results.row(name).scores[domain]
    assert differs > 2  # a tag is read
    assert STRANGER not in results.row("base, right tag").scores
    assert results.row("base, right tag").active_parameters == checkpoint.parameters.dense
    assert results.row("mixture, right tag").total_parameters == checkpoint.parameters.total


def test_the_command_line(checkpoint: Checkpoint) -> None:
    options = ("--pairs", "2", "--max-new-tokens", "4")
    assert "mixture, right label" in modekit("eval-translation", checkpoint.folder, *options, "--labels", "gate")
    data = json.loads(modekit("eval-translation", checkpoint.folder, *options, "--labels", "tag", "--json"))
    assert "mixture, wrong tag" in [row["name"] for row in data["rows"]]
