"""eval.json has one reader, which everybody asks; tables in Markdown have one writer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import Workshop
from modekit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from modekit.evaluation.evaluate import evaluate
from modekit.evaluation.identity import ReadSequences
from modekit.evaluation.markdown import markdown_table
from modekit.evaluation.results import Results, Row, Score
from modekit.files.read import UNREADABLE
from modekit.report.card import write_card

EMPTY: dict[str, Any] = {"rows": [], "domains": [], "unseen": [], "text": {}, "notes": []}
WRONG = [json.dumps({**EMPTY, **wrong}) for wrong in ({"domains": 5}, {"text": {"law": 5}}, {"text": []})]
SCORES = {"law": Score(1.5, 4.48, 0.9, 0.5, 0.1, None, (3.0, 4.5))}


@pytest.fixture(scope="module")
def checkpoint(shared_workshop: Workshop) -> Checkpoint:
    checkpoint = open_checkpoint(shared_workshop.build("READ"))
    evaluate(checkpoint, tokens_per_domain=60, sequence_length=32)
    return checkpoint


def test_what_is_written_is_read(tmp_path: Path, checkpoint: Checkpoint) -> None:
    checkpoint = Checkpoint(tmp_path, checkpoint.record)
    results = Results(
        [Row("mixture", "mixture", 10, 5, SCORES, "x")], ["law"], [], {"law": ReadSequences(1, 20, "x", 32)}, ["a note"]
    )
    results.write(checkpoint)
    assert Results.read(checkpoint) == results


@pytest.mark.parametrize("damage", ["absent", "cut", "[3]", "{}", '{"rows": NaN}', "[" * 100_000, *WRONG])
def test_damage_is_the_same_to_everybody(checkpoint: Checkpoint, damage: str) -> None:
    path = checkpoint.folder / "results" / "eval.json"
    content = path.read_text()
    assert Results.find(checkpoint) is not None
    path.write_text(content[: len(content) // 2] if damage == "cut" else damage)
    if damage == "absent":
        path.unlink()
    problems: list[str] = []
    with pytest.raises(UNREADABLE):
        Results.read(checkpoint)
    assert Results.find(checkpoint, problems) is None and len(problems) == 1
    assert "modekit eval" in write_card(checkpoint, ask_hub=False).notes[0]
    path.write_text(content)


def test_a_damaged_table_is_made_anew(checkpoint: Checkpoint) -> None:
    path = checkpoint.folder / "results" / "eval.json"
    before = Results.read(checkpoint)
    path.write_text(path.read_text()[:100])
    assert evaluate(checkpoint, tokens_per_domain=60, sequence_length=32).domains == before.domains
    assert [row.identity for row in Results.read(checkpoint).rows] == [row.identity for row in before.rows]


def test_a_bar_in_a_cell_is_no_cell() -> None:
    table = markdown_table(["model", "a|b"], [["x", "1"], ["y", "2 | 3"]])
    assert table.split("\n") == ["| model | a\\|b |", "| --- | --- |", "| x | 1 |", "| y | 2 \\| 3 |"]
    assert markdown_table(["a"], [["b"]], str.upper) == "| A |\n| --- |\n| B |"
