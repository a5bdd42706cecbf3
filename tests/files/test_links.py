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
from modekit.errors import OutputError
from modekit.files.write import check_own, library_writes
from refusal import tree
from writing_commands import COMMANDS, run_in

SIDE = (".tuning", ".training", ".partial")
LEFT_AT = {"tune": 260, "train": 60, "specialize": 14, "specialize with a teacher": 70, "data tokenizer": 10, "build": 40}
"""Command -> the moment at which it is killed, so that most of its side folders are there."""
MANY = {"tune": 61, "train": 5, "specialize with a teacher": 6, "build": 3}
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


def plant(path: Path, elsewhere: Path, way: str) -> bool:
    """Lead an entry elsewhere, where what was there lies then; whether it can be led so."""
    there, entry = os.path.lexists(path), elsewhere / "entry"
    if not path.parent.is_dir() or (way == "a hard link" and (not there or path.is_dir())):
        return False
    if there:
        path.rename(entry)
    if way == "a link":
        path.symlink_to(entry)
    else:
        os.link(entry, path)
    return True


def try_links(shop: Workshop, tmp_path: Path, name: str, stride: int) -> None:
    words = COMMANDS[name].words
    root = shutil.copytree(shop.root, tmp_path / "left")
    found = places(root, tuple(words), LEFT_AT[name])
    assert len(found) > 4, found
    for number, place in enumerate(found[::stride]):
        for way in ("a link", "a hard link"):
            again = shutil.copytree(root, tmp_path / f"{number} {way}")
            elsewhere = tmp_path / f"mine {number} {way}"
            elsewhere.mkdir()
            if not plant(again / place, elsewhere, way):
                continue
            before = tree(elsewhere)
            code, said = run_in(again, words)
            assert tree(elsewhere) == before, f"{place} as {way}: {said}"
            assert code == 0 or (code == 2 and "this is a bug" not in said), f"{place} as {way}: {said}"
            shutil.rmtree(again)


@pytest.mark.parametrize("name", LEFT_AT)
def test_some_entries_lead_elsewhere(writing_shop: Workshop, tmp_path: Path, name: str) -> None:
    try_links(writing_shop, tmp_path, name, MANY.get(name, 2))


@pytest.mark.hostile
@pytest.mark.parametrize("name", LEFT_AT)
def test_every_entry_leads_elsewhere(writing_shop: Workshop, tmp_path: Path, name: str) -> None:
    try_links(writing_shop, tmp_path, name, 1)


def test_what_leads_out_of_a_folder_is_found_at_every_depth(tmp_path: Path) -> None:
    folder = tmp_path / "OUT.training"
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "file").write_text("own")
    os.link(folder / "a" / "file", folder / "a" / "b" / "same")  # both names lie in the folder
    check_own(folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("mine")
    for make in (
        lambda path: path.symlink_to(tmp_path / "mine"),
        lambda path: path.symlink_to("nowhere"),
        os.mkfifo,
        lambda path: os.link(tmp_path / "mine" / "letter", path),
    ):
        make(folder / "a" / "b" / "entry")
        with pytest.raises(OutputError, match="a/b/entry"):
            check_own(folder)
        (folder / "a" / "b" / "entry").unlink()


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
