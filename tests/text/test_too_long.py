"""Pairs that are too long for what reads them, and text that something was made from: the error says that it is this."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import Workshop
from modekit.checkpoint.open import open_checkpoint
from modekit.errors import TextError
from modekit.evaluation.domains import held_out_domains
from modekit.experts.labelled import Reading, read_material
from modekit.loaded.text_training import Training
from modekit.run import QUIET
from modekit.text.document import Pair
from modekit.training.settings import TrainSettings, checked_settings
from modekit.training.texts import read_texts
from pair_models import make_pair_workshop, pair_tokenizer
from refusal import refuse_build
from text.test_kinds import FITS
from text_files import write_records

TOO_LONG = "no pair is short enough to be read"


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    made = make_pair_workshop(tmp_path, "bart")
    sides = ((f"{number} " + "fever " * 33, f"{number} " + "DOSE " * 40) for number in range(60))  # of 200 tokens each
    write_records(tmp_path / "long.jsonl", (Pair(*each) for each in sides))
    return made


@pytest.mark.parametrize("router", FITS)
def test_a_build_says_that_the_pairs_are_too_long(shop: Workshop, router: str) -> None:
    shop.recipe["experts"][1]["text"] = "./long.jsonl"
    message = refuse_build(shop, mixture={"top_k": 2, "router": {**FITS[router], "sequence_length": 128}})
    assert TOO_LONG in message and "experts[1] 'law'" in message and "at most 128 tokens" in message
    assert "shorter pairs" in message and "more text" not in message


@pytest.mark.parametrize("texts", ["self", None])
def test_text_that_a_model_with_an_encoder_has_not_is_asked_for(shop: Workshop, texts: str | None) -> None:
    """It cannot write some; without any a plan says what that costs."""
    shop.recipe["experts"] = [{**each, "text": texts} for each in shop.recipe["experts"]]
    if texts == "self":
        assert "an encoder cannot write text of its own" in refuse_build(shop)
    else:
        notes = shop.plan().notes
        assert "no expert has text: parallel text of each gives a far better router" in notes


def test_whatever_trains_says_so(shop: Workshop) -> None:
    training = Training(sequence_length=128)
    with pytest.raises(TextError, match=TOO_LONG) as caught:
        read_material(["./long.jsonl"], None, Reading(pair_tokenizer(), shop.root, training))
    assert "60 documents" in str(caught.value.found) and "128" in str(caught.value.expected)
    checkpoint = open_checkpoint(shop.build(mixture={"top_k": 1, "router": FITS["bigrams"]}))
    settings = checked_settings({"what": ["mlp"], "sequence_length": 128}, TrainSettings, where="test")
    with pytest.raises(TextError, match=rf"{TOO_LONG}[\s\S]*--text law"):
        read_texts(checkpoint, settings, {"law": ["./long.jsonl"]}, shop.root, run=QUIET)


def test_whatever_compares_says_so(shop: Workshop) -> None:
    checkpoint = open_checkpoint(shop.build(mixture={"top_k": 1, "router": FITS["bigrams"]}, eval={"law": "./long.jsonl"}))
    with pytest.raises(TextError, match=rf"{TOO_LONG}[\s\S]*eval\.law"):
        held_out_domains(checkpoint, tokens_per_domain=1_000, sequence_length=128)
