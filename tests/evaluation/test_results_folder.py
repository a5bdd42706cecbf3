"""eval.json has one reader, which everybody asks; tables in Markdown have one writer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import Workshop
from damage import NO_FILES, in_time, no_file
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.evaluation.evaluate import evaluate
from modekit.evaluation.results import Results, Row, Score
from modekit.evaluation.tables import Cell, ResultTable, as_markdown, markdown_page
from modekit.files.read import UNREADABLE
from modekit.report.card import make_card

EMPTY: dict[str, Any] = {"rows": [], "domains": [], "unseen": [], "notes": []}
WRONG = [json.dumps({**EMPTY, **wrong}) for wrong in ({"domains": 5}, {"rows": {"law": 5}}, {"checkpoint": []})]
SCORES = {"law": Score(1.5, 0.5, None, ((3.0, 2), (4.5, 3)))}


@pytest.fixture(scope="module")
def checkpoint(shared_workshop: Workshop) -> Checkpoint:
    checkpoint = open_checkpoint(shared_workshop.build("READ"))
    evaluate(checkpoint, tokens_per_domain=60, sequence_length=32)
    return checkpoint


def test_what_is_written_is_read(tmp_path: Path, checkpoint: Checkpoint) -> None:
    checkpoint = Checkpoint(tmp_path, checkpoint.record)
    results = Results([Row("mixture", "mixture", 10, 5, SCORES, "x")], ["law"], [], notes=["a note"])
    results.write(checkpoint)
    assert Results.read(checkpoint) == results


@pytest.mark.parametrize("damage", ["gone", "cut", "pipe", "round", "{}", "[" * 100_000, *WRONG])
def test_damage_is_the_same_to_everybody(checkpoint: Checkpoint, damage: str) -> None:
    path = checkpoint.folder / "results" / "eval.json"
    content = path.read_text()
    assert Results.find(checkpoint) is not None
    path.write_text(content[: len(content) // 2] if damage == "cut" else damage)
    if damage in NO_FILES:
        no_file(path, damage)
    problems: list[str] = []
    with in_time(), pytest.raises(UNREADABLE):
        Results.read(checkpoint)
    assert Results.find(checkpoint, problems) is None and len(problems) == 1
    assert "modekit eval" in make_card(checkpoint).notes[0]
    path.unlink(missing_ok=True)
    path.write_text(content)


def test_a_table_in_markdown() -> None:
    """A bar in a cell ends none, two figures stand in one, and a note is one line."""
    table = ResultTable("Title", ["model", "a|b"], [["x", Cell("1\n2")], ["y", "2 | 3"]], "Said.")
    body = "| model | a\\|b |\n| --- | --- |\n| x | 1 / 2 |\n| y | 2 \\| 3 |"
    assert as_markdown(table) == body
    assert markdown_page([table], ["a\n# note"]) == f"## Title\n\nSaid.\n\n{body}\n\n* a # note\n"
    assert as_markdown(ResultTable("", ["a"], [["b"]]), str.upper) == "| A |\n| --- |\n| B |"
