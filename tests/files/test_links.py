"""A side folder that a stranger made, with a link in the place of any of its entries: nothing is written where the link leads.

The folders are what a kill leaves of each command; the same command finds them, with one entry led elsewhere.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from conftest import Workshop
from kills import befallen, changed_paths
from modekit.files.copies import library_writes, link_in
from refusal import tree
from writing_commands import COMMANDS, run_in

SIDE = (".training", ".partial")
LEFT_AT = {"train": 60, "specialize": 14, "specialize with a teacher": 70, "data tokenizer": 10, "build": 40}
"""Command -> the moment at which it is killed, so that most of its side folders are there."""
MANY = {"train": 5, "specialize with a teacher": 6, "build": 3}
"""Command -> one in this many of the places is tried in `make test`."""


def places(root: Path, words: tuple[str, ...], moment: int) -> list[str]:
    """Every entry of the side folders, whether the kill left it or the same command makes it later."""
    befallen(lambda: run_in(root, words), root, moment, "kill")
    left = {path.relative_to(root).as_posix() for path in root.rglob("*")}
    whole = root.with_name("whole")
    shutil.copytree(root, whole)
    later = {path.relative_to(whole).as_posix() for path in changed_paths(lambda: run_in(whole, words), whole)}
    return sorted(
        name
        for name in left | later
        if any(part.endswith(SIDE) for part in name.split("/")) and ".tmp" not in name and "tfevents" not in name
    )


def plant(path: Path, elsewhere: Path) -> bool:
    """Lead an entry elsewhere, where what was there lies then; whether it can be led so."""
    if not path.parent.is_dir():
        return False
    if os.path.lexists(path):
        path.rename(elsewhere / "entry")
    path.symlink_to(elsewhere / "entry")
    return True


def try_links(shop: Workshop, tmp_path: Path, name: str, stride: int) -> None:
    words = COMMANDS[name].words
    root = shutil.copytree(shop.root, tmp_path / "left")
    found = places(root, tuple(words), LEFT_AT[name])
    assert len(found) > 4, found
    for number, place in enumerate(found[::stride]):
        again, elsewhere = shutil.copytree(root, tmp_path / f"{number}"), tmp_path / f"mine {number}"
        elsewhere.mkdir()
        if plant(again / place, elsewhere):
            before = tree(elsewhere)
            code, said = run_in(again, words)
            assert tree(elsewhere) == before, f"{place}: {said}"
            assert code in (0, 2) and "this is a bug" not in said, f"{place}: {said}"
        shutil.rmtree(again)


@pytest.mark.parametrize("name", LEFT_AT)
def test_some_entries_lead_elsewhere(writing_shop: Workshop, tmp_path: Path, name: str) -> None:
    try_links(writing_shop, tmp_path, name, MANY.get(name, 2))


@pytest.mark.hostile
@pytest.mark.parametrize("name", LEFT_AT)
def test_every_entry_leads_elsewhere(writing_shop: Workshop, tmp_path: Path, name: str) -> None:
    try_links(writing_shop, tmp_path, name, 1)


def test_a_link_in_a_folder_is_found_at_every_depth(tmp_path: Path) -> None:
    folder = tmp_path / "OUT.training"
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "file").write_text("own")
    assert link_in(folder) is None
    for target in (tmp_path, "nowhere"):
        (folder / "a" / "b" / "entry").symlink_to(target)
        assert link_in(folder) == f"a/b/entry is a link to {target}"
        (folder / "a" / "b" / "entry").unlink()


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), ValueError("os error 28")])
def test_only_what_a_library_says_of_the_disk_is_said_of_the_disk(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)), library_writes(tmp_path / "new"):
        raise error
    with pytest.raises(OSError, match="is the disk full"), library_writes(tmp_path / "new"):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")


def test_a_library_writes_through_no_link(tmp_path: Path) -> None:
    folder, mine = tmp_path / "new", tmp_path / "mine"
    folder.mkdir()
    mine.mkdir()
    (mine / "model").write_text("mine")
    (folder / "model").symlink_to(mine / "model")
    (folder / "parts").symlink_to(mine)
    with library_writes(folder) as place:
        (place / "model").write_text("new")
        (place / "parts").mkdir()
        (place / "parts" / "model").write_text("new")
    assert tree(mine) == {"model": b"mine"}
    assert tree(folder) == {"model": b"new", "parts": None, "parts/model": b"new"}
    assert not (folder / "model").is_symlink()
    with pytest.raises(ZeroDivisionError), library_writes(folder) as place:
        (place / "model").write_text("half")
        raise ZeroDivisionError
    assert tree(folder) == {"model": b"new", "parts": None, "parts/model": b"new"}
