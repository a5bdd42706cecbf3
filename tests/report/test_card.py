"""The model card of `modekit push`: metadata as the hub reads it, a snippet that runs, licences as the sources say them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from conftest import DOMAINS, Workshop
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.checkpoint.record import CarryRecord
from modekit.evaluation.evaluate import evaluate
from modekit.members.licences import NONE_FOUND, sources_of
from modekit.report.card import Card, facts_of, make_card
from modekit.routing.fit import refit
from pair_models import make_pair_workshop
from refusal import borrow, copy_base, copy_expert, run_python

GPL = "                    GNU GENERAL PUBLIC LICENSE\n                       Version 3, 29 June 2007\n\n Copyright (C) 2007"


@pytest.fixture
def mine(shared_workshop: Workshop, tmp_path: Path) -> Workshop:
    """A workshop whose base and experts this test may write into."""
    workshop = borrow(shared_workshop, tmp_path)
    copy_base(workshop)
    for place in range(len(DOMAINS)):
        copy_expert(workshop, place)
    return workshop


def says(folder: Path, **matter: Any) -> None:
    """Give a model a README that says so."""
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(matter)}---\n# A model\n")


def write_card(checkpoint: Checkpoint) -> Card:
    """The card beside the mixture."""
    card = make_card(checkpoint)
    for name, content in card.contents.items():
        (checkpoint.folder / name).write_bytes(content)
    return card


def card_of(checkpoint: Checkpoint) -> tuple[dict[str, Any], str]:
    """Metadata and text of the card, read by the hub's own library."""
    write_card(checkpoint)
    card = ModelCard.load(checkpoint.folder / "README.md")
    return card.data.to_dict(), card.text


def test_one_licence_of_all_is_that_of_the_mixture(mine: Workshop) -> None:
    for name in ("base", *DOMAINS):
        says(mine.root / name, license="apache-2.0")
    checkpoint = open_checkpoint(mine.build())
    data, text = card_of(checkpoint)
    assert data["license"] == "apache-2.0" and "license_name" not in data and "license_link" not in data
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert {"modekit", "moe", "merge"} <= set(data["tags"])
    assert "differ" not in text and not (checkpoint.folder / "LICENSE.md").exists()
    assert [f"| {name} |" in text for name in ("base model", "expert law")] == [True, True]


def test_licences_that_differ_are_named_in_plain_words(mine: Workshop) -> None:
    says(mine.root / "base", license="apache-2.0")
    says(mine.root / "medicine", license="cc-by-nc-sa-4.0")
    (mine.root / "law" / "LICENSE").write_text(GPL)
    checkpoint = open_checkpoint(mine.build())
    data, text = card_of(checkpoint)
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "of-the-sources", "LICENSE.md")
    page = (checkpoint.folder / "LICENSE.md").read_text()
    for shown in (text, page):
        plain = shown.replace("\\", "")
        assert "licences differ (apache-2.0: base model; cc-by-nc-sa-4.0: expert medicine; other: expert law; " in plain
        assert "no licence was found for expert code" in plain
    assert "advice" not in text


MATTERS = {
    "license: MIT": "mit",
    "license: [mit, apache-2.0]": "other (mit and apache-2.0)",
    "license: other": "other",
    "license: other\nlicense_name: my-terms\nlicense_link: https://example.org/terms": "other (my-terms)",
    "license: &a [*a]": NONE_FOUND,
    "license: !!python/object/apply:os.system [id]": NONE_FOUND,
    'license: "\\ud800"': NONE_FOUND,
}


def test_a_front_matter_is_read_and_not_trusted(mine: Workshop) -> None:
    checkpoint = open_checkpoint(mine.build())
    for matter, expected in MATTERS.items():
        (mine.root / "law" / "README.md").write_text(f"---\n{matter}\n---\ntext\n---\nlicense: gpl-3.0\n---\n")
        assert sources_of(checkpoint)[2].licence == expected, matter


def test_hub_models_are_named(mine: Workshop) -> None:
    """A checkpoint whose base and law expert the recipe names by hub ids, as a record says after a build; two say nothing."""
    says(mine.root / "medicine", license="mit")
    says(mine.root / "code", license="mit")
    checkpoint = open_checkpoint(mine.build())
    named = {"./base": "org/base-1b", "./law": "org/law-1b"}
    sources = [source.model_copy(update={"spec": named.get(source.spec, source.spec)}) for source in checkpoint.record.sources]
    hub = Checkpoint(checkpoint.folder, checkpoint.record.model_copy(update={"sources": sources}))
    data, _ = card_of(hub)
    assert data["base_model"] == ["org/base-1b", "org/law-1b"] and data["base_model_relation"] == "merge"
    assert data["license"] == "other"
    assert any(note.startswith("no licence was found for base model") for note in make_card(hub).notes)
    assert "base_model" not in card_of(checkpoint)[0]


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["token", "context"])
def test_the_snippet_runs(mine: Workshop, granularity: str) -> None:
    mixture = {"method": "routing", "top_k": 2, "router": {"fit": "random", "granularity": granularity}}
    checkpoint = open_checkpoint(mine.build('A mix\'s "own" name', mixture=mixture))
    _, text = card_of(checkpoint)
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert ("import modekit" in snippet) == (not checkpoint.shape.plain)
    done = run_python(snippet, cwd=checkpoint.folder.parent)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_what_goes_through_channels_is_not_said_to_be_the_bases(mine: Workshop) -> None:
    built = open_checkpoint(mine.build())
    assert facts_of(built)["backbone"] == "the base model"
    carry = CarryRecord(outputs=32, inputs=32, terms=2, head=True)
    record = built.record.model_copy(update={"carry": carry})
    said = facts_of(Checkpoint(built.folder, record, built.shape))["backbone"]
    assert said == "the base model; what experts change of attention, head goes through channels"


@pytest.mark.parametrize("choice", [{"top_k": 1}, {"top_p": 0.6}, {"threshold": 0.3}])
def test_who_takes_part_in_every_token_is_said(mine: Workshop, choice: dict[str, Any]) -> None:
    for expert, said in (("code", "code"), ("base", "the base model")):
        always = {"expert": expert, "weight": 0.2}
        checkpoint = open_checkpoint(mine.build(mixture={**choice, "always_on": always, "router": {"fit": "random"}}))
        assert str(facts_of(checkpoint)["decides"]).endswith(f", and {said} takes part in every token (weight 0.2)")


def test_the_snippet_asks_a_model_that_knows_conversations(mine: Workshop) -> None:
    (mine.root / "base" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    checkpoint = open_checkpoint(mine.build())
    (snippet,) = re.findall(r"```python\n(.*?)```", card_of(checkpoint)[1], re.DOTALL)
    assert "apply_chat_template" in snippet and '"The"' not in snippet
    done = run_python(snippet, cwd=checkpoint.folder.parent)
    assert done.returncode == 0 and "tellmeabout" in done.stdout.replace(" ", ""), done.stderr


def test_the_table_is_in_it_when_it_is_this_mixtures(mine: Workshop) -> None:
    mixture = {"method": "routing", "router": {"fit": "logistic", "tokens_per_domain": 600, "sequence_length": 32}}
    checkpoint = open_checkpoint(mine.build(mixture=mixture))
    _, text = card_of(checkpoint)
    assert "there is no eval.json" in text
    results = evaluate(checkpoint, tokens_per_domain=200, sequence_length=32)
    _, text = card_of(checkpoint)
    loss = results.row("mixture").scores["law"].loss
    assert f"{loss:.3f} / " in text and "| mixture |" in text and "oracle" in text
    changed = refit(checkpoint, {"router": {"temperature": 0.01}})
    _, text = card_of(changed)
    assert "another state" in text and "| mixture |" not in text
    (changed.folder / "results" / "eval.json").write_text("[3]")
    assert "eval.json is damaged" in card_of(changed)[1]


def test_of_a_mixture_that_translates(tmp_path: Path) -> None:
    router = {"fit": "random", "seed": 1}
    checkpoint = open_checkpoint(make_pair_workshop(tmp_path, "bart").build(mixture={"top_k": 1, "router": router}))
    data, text = card_of(checkpoint)
    assert data["pipeline_tag"] == "translation" and "BLEU" not in text
    found = translations_of(checkpoint)
    path = checkpoint.folder / "results" / "translate.json"
    path.parent.mkdir()
    path.write_text(json.dumps(found))
    _, text = card_of(checkpoint)
    assert "translated greedily" in text and "a\\|b; c" in text and "* few &lt;pairs&gt;" in text
    assert "| mixture | 12.3 / 45.7 | - | - | 1.0 / 2.0 |" in text and "there is no eval.json" in text
    path.write_text(json.dumps({**found, "checkpoint": {**checkpoint.identity, "router_sha256": "0" * 64}}))
    written = write_card(checkpoint)
    assert any("translate.json is of another state" in note for note in written.notes)
    assert "BLEU" not in (checkpoint.folder / "README.md").read_text()


def translations_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """A translate.json of a domain, one that not every model was scored on, and an unseen one."""
    row = {"total_parameters": 9, "active_parameters": 9}
    scores = {"law": {"bleu": 12.34, "chrf": 45.67}, "mail": {"bleu": 1.0, "chrf": 2.0}}
    return {
        "format": 1,
        "checkpoint": checkpoint.identity,
        "decoding": {"beams": 1, "batch": 4, "max_new_tokens": 8},
        "signature": "a|b; c",
        "domains": ["law", "code"],
        "unseen": ["mail"],
        "notes": ["few <pairs>"],
        "rows": [{"name": "mixture", "kind": "mixture", "domains": scores, **row}],
    }


def test_the_recipe_in_it_is_the_recipe(mine: Workshop) -> None:
    checkpoint = open_checkpoint(mine.build())
    _, text = card_of(checkpoint)
    (recipe,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert yaml.safe_load(recipe) == json.loads((checkpoint.folder / "modekit.json").read_text())["recipe"]
