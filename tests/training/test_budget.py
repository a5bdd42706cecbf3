"""Small budgets: nothing reads more held-out text than was asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import modekit.training.cheap as cheap_module
from conftest import Workshop
from modekit.errors import TrainingError
from modekit.evaluation.domains import Domain
from modekit.training.settings import given_settings
from refusal import borrow


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


def test_a_cheap_training_of_a_small_budget_scores_little(
    shared_workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modekit.cli.shell import main

    workshop = borrow(shared_workshop, tmp_path)
    out = workshop.build(mixture={"method": "routing", "top_k": 2, "router": {"fit": "random"}})
    scored: list[int] = []
    score = cheap_module.score_domain

    def counted(model: Any, domain: Domain, *rest: Any) -> Any:
        scored.append(sum(len(sequence.ids) for sequence in domain.sequences))
        return score(model, domain, *rest)

    monkeypatch.setattr(cheap_module, "score_domain", counted)
    options = ["--cheap", "--share", "0.5", "--tokens", "100", "--sequence-length", "32", "--steps", "2"]
    monkeypatch.setattr("sys.argv", ["modekit", "train", str(out), *options])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0 and scored and max(scored) <= 100
