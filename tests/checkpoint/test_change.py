"""A new router changes several files together: killed at any moment, the checkpoint is the old one or the new one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from conftest import Workshop
from modekit.checkpoint.open import open_checkpoint
from modekit.errors import CheckpointError, OutputError
from modekit.files.lock import Lock
from modekit.files.marker import CHANGE_LOCK
from modekit.routing.fit import refit
from refusal import borrow, tree

CHANGES = {"method": "linear"}
"""Other gates, other slots in the modekit shape, another config and record."""


@pytest.fixture(scope="module", params=["plain", "modekit"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, shared_workshop: Workshop) -> Path:
    bench = borrow(shared_workshop, tmp_path_factory.mktemp(request.param))
    return bench.build(output={"format": request.param})


def test_a_link_in_the_changes_place_is_not_followed(built: Path, tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "OUT", tmp_path / "elsewhere"
    shutil.copytree(built, out)
    elsewhere.mkdir()
    (elsewhere / "config.json").write_text("{}")
    before = tree(elsewhere)
    (out / ".modekit.changed").symlink_to(elsewhere)
    refit(open_checkpoint(out), CHANGES)
    assert tree(elsewhere) == before


def test_a_change_of_what_another_command_changed_meanwhile_is_refused(built: Path, tmp_path: Path) -> None:
    out = tmp_path / "OUT"
    shutil.copytree(built, out)
    opened = open_checkpoint(out)
    refit(open_checkpoint(out), CHANGES)
    before = tree(out)
    with pytest.raises(CheckpointError, match="changed the checkpoint meanwhile"):
        refit(opened, {"method": "gating"})
    assert tree(out) == before


def test_two_changes_at_once_wait_for_each_other(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "OUT"
    shutil.copytree(built, out)
    monkeypatch.setattr("modekit.files.change._PATIENCE", 0.1)
    other = Lock(out / CHANGE_LOCK)
    assert other.take()
    with pytest.raises(OutputError, match="another command is changing this folder"):
        refit(open_checkpoint(out), CHANGES)
    other.release()
    refit(open_checkpoint(out), CHANGES)
