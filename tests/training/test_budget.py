"""Small budgets: nothing reads more held-out text than was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from modekit.errors import TrainingError
from modekit.training.settings import given_settings


@pytest.mark.parametrize(
    ("tokens", "said", "select"), [(None, {}, 8192), (128, {}, 128), (10, {}, 64), (20_000, {}, 8192), (0, {}, 8192)]
)
def test_states_are_compared_on_no_more_text_than_the_tables(tokens: int | None, said: dict[str, int], select: int) -> None:
    assert given_settings(said, None, held_out_tokens=tokens).select_tokens == select


def test_what_is_said_counts_more(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("select_tokens: 1000\nsteps: 3\n")
    assert given_settings({}, file, held_out_tokens=128).select_tokens == 1000
    wanted = given_settings({"select_tokens": 256}, file, held_out_tokens=128)
    assert (wanted.select_tokens, wanted.steps) == (256, 3)
    with pytest.raises(TrainingError, match="select_tokens"):
        given_settings({"select_tokens": 1}, None)
