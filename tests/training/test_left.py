"""What a killed training left, when somebody else made it: read as what it must be, and nothing outside of its folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from damage import in_time, no_file
from modekit.errors import InterruptError, TrainingError
from modekit.files.output import WorkFolder
from modekit.training.folder import TrainingFolder, TrainingOutcome
from modekit.training.settings import read_settings


@pytest.fixture
def folder(tmp_path: Path) -> TrainingFolder:
    made = TrainingFolder(tmp_path / "OUT")
    work = WorkFolder(tmp_path / "OUT", "training")
    work.take()
    work.lock.release()
    (made.path / "checkpoint-2").mkdir()
    (made.path / "checkpoint-2" / "model.safetensors").write_bytes(b"x")
    return made


@pytest.mark.parametrize("again", [False, True])
def test_ctrl_c_while_it_is_cleared_says_that_all_is_done(
    folder: TrainingFolder, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    """Whether a state was removed by then or not."""
    clear = WorkFolder.clear

    def interrupted(cleared: WorkFolder) -> None:
        monkeypatch.setattr(WorkFolder, "clear", clear)
        if again:
            clear(cleared)
        raise KeyboardInterrupt

    with pytest.raises(InterruptError, match="interrupted; OUT was finished by then"), folder.held("x", "y"):
        monkeypatch.setattr(WorkFolder, "clear", interrupted)
    assert not folder.path.exists()


def ended(best_step: int = 2) -> TrainingOutcome:
    failed = ("no", "x", "3.0")
    return TrainingOutcome(steps=3, best_step=best_step, losses={"law": (3.0, 2.5)}, failed=failed, notes=["a"], tokens=6)


def test_how_it_ended_comes_back(folder: TrainingFolder) -> None:
    assert folder.outcome() is None
    folder.keep("trained", ended().model_dump(mode="json"))
    again = folder.outcome()
    assert again is not None and again.best_state(folder.path) == folder.path / "checkpoint-2" / "model.safetensors"
    assert again.model_dump(mode="json") == ended().model_dump(mode="json")


def test_a_pipe_is_not_waited_for(folder: TrainingFolder, tmp_path: Path) -> None:
    for path in (folder.path / "settings.json", tmp_path / "train.yaml"):
        path.touch()
        no_file(path, "pipe")
    with in_time(), pytest.raises(TrainingError, match=r"not a regular file"):
        folder.take("x", "y")
    with in_time(), pytest.raises(TrainingError, match="not a regular file"):
        read_settings(tmp_path / "train.yaml")
