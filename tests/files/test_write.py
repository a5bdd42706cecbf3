"""One file appears whole, and nothing is written through a link that others may have put there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from modekit.files.change import change_together
from modekit.files.copies import carry_over, copy_file, sweep
from modekit.files.lock import Lock
from modekit.files.read import read_bytes
from modekit.files.write import appearing, create, files_below, remove, write_file
from refusal import tree


def test_a_link_in_a_files_place_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "OUT").mkdir()
    (tmp_path / "OUT" / "eval.json").symlink_to(tmp_path / "mine")
    write_file(tmp_path / "OUT" / "eval.json", b"{}")
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / "OUT" / "eval.json").read_text() == "{}"
    assert not (tmp_path / "OUT" / "eval.json").is_symlink()


@pytest.mark.parametrize("kind", ["file", "link", "dangling link", "folder"])
def test_a_new_file_is_never_an_old_one(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "new"
    (tmp_path / "mine").write_text("mine")
    if kind == "file":
        path.write_text("old")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / ("mine" if kind == "link" else "nowhere"))
    before = tree(tmp_path)
    with pytest.raises(FileExistsError):
        create(path)
    assert tree(tmp_path) == before


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    before = tree(tmp_path)
    with pytest.raises(ZeroDivisionError), appearing(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    with pytest.raises(OSError), appearing(tmp_path / "file") as temporary:
        temporary.mkdir()  # a folder never replaces a file
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    with pytest.raises(OSError), appearing(tmp_path / "folder") as temporary:
        temporary.mkdir()
    assert tree(tmp_path) == {**before, "folder": None, "folder/mine": b"mine"}


def test_a_pipe_is_neither_copied_nor_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        copy_file(tmp_path / "pipe", tmp_path / "copy")
    with pytest.raises(OSError, match="not a regular file"):
        read_bytes(tmp_path / "pipe", 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipe"]


def test_links_are_carried_over_as_links_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "from" / "deep").mkdir(parents=True)
    (tmp_path / "from" / "deep" / "notes.txt").write_text("notes")
    (tmp_path / "from" / "key").symlink_to("../secret")
    (tmp_path / "from" / "folder").symlink_to("..")
    os.mkfifo(tmp_path / "from" / "pipe")
    carry_over(tmp_path / "from", tmp_path / "without")
    assert files_below(tmp_path / "without") == ["deep/notes.txt"]
    carry_over(tmp_path / "from", tmp_path / "with", links=True)
    assert files_below(tmp_path / "with") == ["deep/notes.txt", "folder", "key"]
    assert (tmp_path / "with" / "key").readlink() == Path("../secret")


def test_a_link_is_removed_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("mine")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / ".modekit.0123456789abcdef.tmp").symlink_to(tmp_path / "mine")
    (tmp_path / "work" / "deep").symlink_to(tmp_path / "mine")
    sweep(tmp_path / "work")
    assert (tmp_path / "work" / "deep").exists()
    remove(tmp_path / "work" / "deep")
    assert list((tmp_path / "work").iterdir()) == []
    assert (tmp_path / "mine" / "letter.txt").exists()


@pytest.mark.parametrize("place", ["results", "results/plots", "results/eval.json"])
def test_nothing_is_put_behind_a_link(tmp_path: Path, place: str) -> None:
    out, elsewhere = tmp_path / "OUT", tmp_path / "elsewhere"
    (elsewhere / "plots").mkdir(parents=True)
    (elsewhere / "eval.json").write_text("mine")
    (out / place).parent.mkdir(parents=True)
    (out / place).symlink_to(elsewhere / "eval.json" if place.endswith(".json") else elsewhere)
    before = tree(elsewhere)
    files = {"results/eval.json": b"{}", "results/plots/loss.svg": b"<svg/>"}
    if place.endswith(".json"):
        change_together(out, files)  # the link itself gives way
        assert not (out / place).is_symlink()
    else:
        with pytest.raises(OSError, match="in the way"):
            change_together(out, files)
        assert [path.name for path in out.iterdir()] == ["results"]
    assert tree(elsewhere) == before


def test_a_link_in_the_locks_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".modekit.lock").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError):
        Lock(tmp_path / ".modekit.lock").take()
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_folder_in_a_files_place_is_said(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(OSError, match="in the way"):
        change_together(tmp_path, {"config.json": b"{}"})
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
