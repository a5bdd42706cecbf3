"""What is said of an extraction that keeps little."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from conftest import Workshop
from modekit.experts.carried import notes_of
from refusal import borrow


def record(carried: float, weight_error: float, outside: list[str]) -> dict[str, Any]:
    totals = {"carried": carried, "weight_error": weight_error, "largest_rank": 16}
    return {"totals": totals, "not_carried": dict.fromkeys(outside, 0.1)}


def test_most_kept_needs_no_words() -> None:
    assert notes_of(record(0.9, 0.1, [])) == []


def test_a_rank_that_is_too_small_is_named() -> None:
    notes = notes_of(record(0.16, 0.91, []))
    assert len(notes) == 2 and "16%" in notes[0] and "rank 16 is too small" in notes[1] and "--energy" in notes[1]


def test_what_lies_elsewhere_is_named() -> None:
    notes = notes_of(record(0.2, 0.1, ["model.embed_tokens.weight", "lm_head.weight", "a", "b"]))
    assert len(notes) == 2 and "model.embed_tokens.weight, lm_head.weight, a and 1 more" in notes[1]


def test_the_command_warns(shared_workshop: Workshop, tmp_path: Path) -> None:
    workshop = borrow(shared_workshop, tmp_path)
    base, law = workshop.recipe["base_model"], workshop.recipe["experts"][1]["model"]
    command = [sys.executable, "-m", "modekit", "extract", law, str(tmp_path / "lora"), "--base", base, "--rank", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "note: the adapter keeps" in done.stdout and "rank 1 is too small" in done.stdout
