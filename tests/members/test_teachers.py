"""Who taught an expert is said by the card, as long as its folder says so."""

from __future__ import annotations

import json

import pytest

from conftest import Workshop
from modekit.checkpoint.checkpoint import open_checkpoint
from modekit.members.licences import teacher_of
from modekit.report.card import make_card


def test_an_experts_teacher_is_named(workshop: Workshop) -> None:
    (workshop.root / "law" / "specialist.json").write_text(
        json.dumps({"specialist": "full", "teacher": {"name": "a *large* one"}})
    )
    checkpoint = open_checkpoint(workshop.build())
    assert r"law by a \*large\* one" in make_card(checkpoint, ask_hub=False).contents["README.md"].decode()


@pytest.mark.parametrize("said", ["", "[]", '{"teacher": 3}', '{"teacher": {"name": 7}}', '{"specialist": "mlp"}'])
def test_a_folder_that_says_nothing_of_a_teacher_names_none(workshop: Workshop, said: str) -> None:
    (workshop.root / "law" / "specialist.json").write_text(said)
    assert teacher_of(workshop.root / "law") is None
    assert teacher_of(workshop.root / "gone") is None
