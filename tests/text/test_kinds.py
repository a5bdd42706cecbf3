"""Pairs for a model that reads text, and text for one that reads pairs: refused by whoever reads it, with its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import Workshop, make_workshop
from modekit.checkpoint.open import open_checkpoint
from modekit.errors import TextError
from modekit.training.settings import TrainSettings, checked_settings
from modekit.training.train import train
from pair_models import make_pair_workshop, pairs
from refusal import refuse, refuse_build
from text_files import write_records

PLAIN = [{"text": f"plain {number} text"} for number in range(60)]
PAIRS = pairs(60)
FITS: dict[str, dict[str, Any]] = {
    "lexical": {"fit": "lexical"},
    "bigrams": {"fit": "lexical", "orders": [1, 2], "buckets": 64},
    "logistic": {"fit": "logistic"},
}


def of_pairs(root: Path) -> tuple[Workshop, list[Any], str]:
    return make_pair_workshop(root, "bart"), PLAIN, "needs pairs"


def of_text(root: Path) -> tuple[Workshop, list[Any], str]:
    return make_workshop(root), PAIRS, "reads plain text"


Made = Callable[[Path], tuple[Workshop, list[Any], str]]


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("made", [of_pairs, of_text])
def test_a_build_refuses_the_other_kind_whatever_its_router_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Made, fit: str
) -> None:
    shop, wrong, says = made(tmp_path)
    write_records(tmp_path / "wrong.jsonl", wrong)
    for expert in shop.recipe["experts"][1:]:
        expert["text"] = "./wrong.jsonl"
    monkeypatch.setattr("modekit.building.build.staging", None)  # before anything is copied
    message = refuse_build(shop, mixture={"top_k": 2, "router": FITS[fit]})
    assert says in message and "where:    experts[1] 'law': text" in message, message


@pytest.mark.parametrize("made", [of_pairs, of_text])
def test_a_fit_an_evaluation_and_a_training_say_which_text_it_is(tmp_path: Path, made: Made) -> None:
    shop, wrong, says = made(tmp_path)
    mixture = {"top_k": 2, "modules": ["mlp"], "router": FITS["bigrams"]}
    write_records(tmp_path / "wrong.jsonl", wrong)
    out = shop.build(mixture=mixture, eval={"music": "./wrong.jsonl"})
    message = refuse("eval", out)
    assert says in message and "where:    eval.music" in message
    settings = checked_settings({"what": ["mlp"], "generic": [str(tmp_path / "wrong.jsonl")]}, TrainSettings, where="test")
    with pytest.raises(TextError, match=rf"{says}[\s\S]*generic"):
        train(open_checkpoint(out), settings)
    for expert in shop.recipe["experts"]:
        write_records(tmp_path / expert["text"], wrong)
    message = refuse("fit", out, "fit=logistic")
    assert says in message and "experts[0] 'medicine': text" in message
