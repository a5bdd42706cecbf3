"""The plan's notes: what full models lose on the base model's backbone."""

from __future__ import annotations

import json
from typing import Any

import pytest

from conftest import Workshop

ROUTER = {"fit": "random"}


def notes_of(workshop: Workshop, **changes: Any) -> list[str]:
    """The plan's notes on full models, without a build."""
    plan = workshop.plan(**changes)
    return [note for note in plan.notes if "changed outside of the mixed modules" in note]


def specialist(workshop: Workshop, name: str, trained: str) -> None:
    (workshop.root / name / "specialist.json").write_text(json.dumps({"specialist": trained}))


@pytest.mark.parametrize("shape", ["plain", "modekit"])
def test_full_models_lose_what_is_not_mixed(workshop: Workshop, shape: str) -> None:
    workshop.recipe["experts"].append({"name": "general", "model": "base"})
    specialist(workshop, "medicine", "mlp")
    specialist(workshop, "code", "full")
    (note,) = notes_of(workshop, output={"format": shape})
    assert "what law, code changed" in note and "`modekit verify --deep` measures" in note


def test_models_in_a_few_bits_lose_it_too(workshop: Workshop) -> None:
    experts = [{**expert, "bits": 2} for expert in workshop.recipe["experts"]]
    (note,) = notes_of(workshop, experts=experts)
    assert "what medicine, law, code changed" in note
    whole = {"modules": "all", "router": {"fit": "random", "granularity": "sequence", "per": "model"}}
    assert notes_of(workshop, experts=experts, mixture={"method": "gating", **whole}) == []


@pytest.mark.parametrize(
    "mixture",
    [{"backbone": "average"}, {"modules": "all", "router": {"fit": "random", "granularity": "sequence", "per": "model"}}],
    ids=["merged backbone", "everything mixed"],
)
def test_nothing_is_lost_when_all_is_merged_or_mixed(workshop: Workshop, mixture: dict[str, Any]) -> None:
    assert notes_of(workshop, mixture={"method": "gating", "router": ROUTER, **mixture}) == []


def test_ffn_specialists_lose_the_layers_that_are_not_mixed(workshop: Workshop) -> None:
    for name in ("medicine", "law", "code"):
        specialist(workshop, name, "mlp")
    assert notes_of(workshop) == []
    (note,) = notes_of(workshop, mixture={"method": "gating", "router": ROUTER, "layers": ["0-1"]})
    assert "what medicine, law, code changed" in note


def test_a_damaged_record_says_nothing(workshop: Workshop) -> None:
    (workshop.root / "law" / "specialist.json").write_text("{")
    (workshop.root / "code" / "specialist.json").write_text("[]")
    (note,) = notes_of(workshop)
    assert "what medicine, law, code changed" in note
