"""What a killed search left, when somebody else made it: damage is said, and what of it is still whole is used."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest

from damage import in_time, no_file
from modekit.errors import TuneError
from modekit.search.tune.folder import read_kept
from modekit.search.tune.results import Losses
from modekit.search.tune.study import candidates, open_study, prepare
from modekit.search.tune.tune import reference_losses

DAMAGE = ["", "[", "null", "[]", "7", '{"1": {"law": "low"}}', '{"1": [3]}', '{"1": {"law": 1e999}}', "[" * 5_000, '{"1": NaN}']


@pytest.mark.parametrize("content", DAMAGE)
def test_damaged_losses_are_said(tmp_path: Path, content: str) -> None:
    folder = tmp_path / "OUT.tuning"
    folder.mkdir()
    (folder / "reported.json").write_text(content)
    with pytest.raises(TuneError, match=r"remove the folder OUT\.tuning to start over"):
        read_kept(folder / "reported.json", dict[str, Losses])


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    for name in ("settings.json", "study.log"):
        (tmp_path / name).touch()
        no_file(tmp_path / name, "pipe")
    with in_time(), pytest.raises(TuneError, match="not a regular file"):
        read_kept(tmp_path / "settings.json", dict[str, Any])
    with in_time(), pytest.raises(TuneError, match="not a file of its own"):
        prepare(job(tmp_path))


def job(folder: Path) -> Any:
    return SimpleNamespace(work=folder, seed=0)


@pytest.mark.parametrize(
    "content",
    ["7\n", "[]\n", "{}\n", '{"op_code": 99}\n', '{"op_code": 4, "trial_id": 9, "worker_id": "x"}\n', "[" * 5_000 + "\n"],
)
def test_a_damaged_log_is_said(tmp_path: Path, content: str) -> None:
    (tmp_path / "study.log").write_text(content)
    with pytest.raises(TuneError, match="what a search left is damaged"):
        open_study(job(tmp_path))


@pytest.mark.parametrize(
    "said", [{"key": 7}, {"key": "["}, {"key": "[]"}, {"key": "{}", "losses": [1]}, {"key": "{}", "tokens": "x"}, {}]
)
def test_a_candidate_that_says_something_else(tmp_path: Path, said: dict[str, Any]) -> None:
    study = open_study(job(tmp_path))
    trial = study.ask()
    for name, value in said.items():
        trial.set_user_attr(name, value)
    study.tell(trial, 1.0)
    with pytest.raises(TuneError, match="what a search left is damaged"):
        candidates(job(tmp_path))
    assert optuna.logging.get_verbosity() != optuna.logging.CRITICAL


def test_references_of_other_domains_are_made_anew(tmp_path: Path) -> None:
    (tmp_path / "reference.json").write_text(json.dumps({"select": {"base": {"law": 1.0}, "own": {}}}))
    selection = SimpleNamespace(domains=[SimpleNamespace(name="law")])
    with pytest.raises(AttributeError):  # a model is asked for: what is kept was not taken
        reference_losses(job(tmp_path), SimpleNamespace(), {"select": selection}, SimpleNamespace())  # type: ignore[arg-type, dict-item]
    whole = {"select": {"base": {"law": 1.0}, "own": {"law": 0.5}}}
    (tmp_path / "reference.json").write_text(json.dumps(whole))
    assert reference_losses(job(tmp_path), SimpleNamespace(), {"select": selection}, SimpleNamespace()) == whole  # type: ignore[arg-type, dict-item]
