"""What is said of an extraction that keeps little."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from conftest import Workshop
from modekit.experts.extract_record import AdapterTotals, Extraction, RankSettings
from refusal import borrow


def notes(carried: float, weight_error: float, outside: list[str]) -> list[str]:
    ranks = {"modules": 1, "smallest_rank": 16, "largest_rank": 16, "parameters": 1, "bytes": 4}
    errors = {"error": 0.1, "energy": 0.9, "weight_error": weight_error, "drift": 0.1, "carried": carried}
    return Extraction(
        model="law",
        base_model="base",
        settings=RankSettings(rank=16, energy=None, max_rank=None, modules=None),
        text=None,
        tensors={},
        kinds={},
        totals=AdapterTotals(**ranks, **errors),
        unchanged=[],
        not_carried=dict.fromkeys(outside, 0.1),
    ).notes()


def test_most_kept_needs_no_words() -> None:
    assert notes(0.9, 0.1, []) == []


def test_a_rank_that_is_too_small_is_named() -> None:
    first, second = notes(0.16, 0.91, [])
    assert "16%" in first and "rank 16 is too small" in second and "--energy" in second


def test_what_lies_elsewhere_is_named() -> None:
    _, second = notes(0.2, 0.1, ["model.embed_tokens.weight", "lm_head.weight", "a", "b"])
    assert "model.embed_tokens.weight, lm_head.weight, a and 1 more" in second


def test_the_command_warns(shared_workshop: Workshop, tmp_path: Path) -> None:
    workshop = borrow(shared_workshop, tmp_path)
    base, law = workshop.recipe["base_model"], workshop.recipe["experts"][1]["model"]
    command = [sys.executable, "-m", "modekit", "extract", law, str(tmp_path / "lora"), "--base", base, "--rank", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "note: the adapter keeps" in done.stdout and "rank 1 is too small" in done.stdout
