"""A new router changes several files together: killed at any moment, the checkpoint is the old one or the new one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest

from conftest import Workshop
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.checkpoint import open_checkpoint
from modekit.routing.refit import refit
from refusal import borrow, tree

CHANGES = {"method": "linear"}
"""Other gates, other slots in the modekit shape, another config and record."""


class Killed(BaseException):
    """Nobody catches it, and nothing is tidied up."""


@contextmanager
def killed_before(operation: int) -> Iterator[list[str]]:
    """Die before the n-th operation on files."""
    done: list[str] = []

    def counting(name: str) -> object:
        real = getattr(Path, name)

        def counted(path: Path, *args: object, **kwargs: object) -> object:
            if len(done) == operation:
                raise Killed
            done.append(f"{name} {path.name}")
            return real(path, *args, **kwargs)

        return counted

    names = ("mkdir", "write_bytes", "rename", "replace", "rmdir")
    with patch.multiple(Path, **{name: counting(name) for name in names}):
        yield done


@pytest.fixture(scope="module", params=["native", "modekit"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, shared_workshop: Workshop) -> Path:
    bench = borrow(shared_workshop, tmp_path_factory.mktemp(request.param))
    return bench.build(output={"format": request.param})


def test_old_or_new_whatever_the_moment(built: Path, tmp_path: Path) -> None:
    out, whole = built.with_name("killed"), built.with_name("whole")
    shutil.copytree(built, whole)
    before = tree(built)
    refit(open_checkpoint(whole), CHANGES)
    after = tree(whole)
    assert before != after
    moments = states = 0
    while True:
        shutil.copytree(built, out)
        try:
            with killed_before(moments):
                refit(open_checkpoint(out), CHANGES)
        except Killed:
            opened = open_checkpoint(out)
            assert is_proven(verify(opened, reload=False))
            states |= 1 if opened.record.recipe.mixture.method == "routing" else 2
            refit(opened, CHANGES)
            assert tree(out) == after, moments
            shutil.rmtree(out)
            moments += 1
            continue
        assert tree(out) == after
        shutil.rmtree(out)
        shutil.rmtree(whole)
        break
    assert moments >= 8
    assert states == 3  # some moments left the old one, some the new one


def test_a_full_disk_changes_nothing(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "OUT"
    shutil.copytree(built, out)
    before = tree(out)

    def full(path: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        refit(open_checkpoint(out), CHANGES)
    assert tree(out) == before


def test_a_link_in_the_changes_place_is_not_followed(built: Path, tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "OUT", tmp_path / "elsewhere"
    shutil.copytree(built, out)
    elsewhere.mkdir()
    (elsewhere / "config.json").write_text("{}")
    (out / ".changed").symlink_to(elsewhere)
    open_checkpoint(out)
    assert (elsewhere / "config.json").exists()
