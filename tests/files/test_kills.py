"""Every command, killed, interrupted or out of room before the n-th change of a file: the old or the new is whole.

The same command then goes on; killed when all was in its place, it says what is there. What a message says of the disk is so.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from conftest import Workshop
from kills import KILLED, Ended, Fate, befallen
from modekit.checkpoint.open import open_checkpoint
from modekit.files.staging import Staging
from refusal import Tree, tree
from writing_commands import COMMANDS, Command, check_whole, run_in, stable

CODES: dict[Fate, int] = {"kill": -KILLED, "interrupt": 130, "full": 2, "stuck": 2}
RARER: dict[Fate, int] = {"kill": 1, "interrupt": 5, "full": 5, "stuck": 11}
"""Fate -> one in this many of the moments of a command's stride is tried."""
_TAKES_LONG = {"export gguf"}
_WORK_FOLDERS = ("OUT.partial", "NEW.partial", "THREE.partial", "OUT.training", "NEW.training")
_FINISHED = "was finished by then"
_TO_GO_ON_FROM = {"OUT.training", "NEW.training", "KEPT.partial"}


def try_moments(shop: Workshop, tmp_path: Path, command: Command, stride: int, fate: Fate) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(shop.root, whole)
    before = tree(whole)
    assert run_in(whole, command.words)[0] == 0
    wanted = left_in(whole)
    for moment in range(1, 5000, stride):
        root = tmp_path / f"at{moment}"
        shutil.copytree(shop.root, root)
        ended = befallen(lambda root=root: run_in(root, command.words), root, moment, fate)
        if not ended.came:
            assert ended.code == 0, ended.said
            assert moment > command.least, "the hook saw too little"
            assert left_in(root) == wanted
            return
        check_whole(root)
        if ended.code == 0:  # what did not come off was no part of what was asked for
            found = left_in(root)
            left = found.keys() - wanted.keys() if fate == "stuck" else set()  # what could not be removed
            assert {name: found[name] for name in found.keys() - left} == wanted, f"{moment}: {ended.said}"
            shutil.rmtree(root)
            continue
        check_end(ended, fate, root, before)
        left = {name: content for name, content in left_in(root).items() if not name.startswith(_WORK_FOLDERS)}
        done = left == wanted
        code, said = run_in(root, command.words)
        assert code == 0 or (done and (fate == "kill" or _FINISHED in ended.said)), f"{moment}: {said}"
        found = left_in(root)
        assert found.keys() == wanted.keys(), f"{moment}: {sorted(found.keys() ^ wanted.keys())}"
        different = [name for name in wanted if found[name] != wanted[name] and not (done and command.work)]
        assert not different, f"{moment}: {different}"
        shutil.rmtree(root)


def left_in(root: Path) -> Tree:
    """What must be the same wherever it is made: an exported adapter names its base by its whole path."""
    return {name: content and content.replace(bytes(root), b"ROOT") for name, content in stable(tree(root)).items()}


def check_end(ended: Ended, fate: Fate, root: Path, before: Tree) -> None:
    """The exit code and message fit what has happened, and what is said of the disk is so."""
    said = f"{root.name}: {ended.said}"
    assert "Traceback" not in said and "this is a bug" not in said, said
    assert ended.code == CODES[fate], said
    if fate == "interrupt":
        assert "interrupted" in said and not (_FINISHED in said and "to do:" in said), said
    where = re.search(rf"\n  where:    .*{re.escape(root.name)}/(\S+)", said)
    if fate in ("full", "stuck"):
        assert where is not None, said
    if "nothing was left behind" in said:
        assert where is not None, said
        left = {name: content for name, content in tree(root).items() if name.startswith(where[1])}  # X and X.partial
        there = {name: content for name, content in before.items() if name.startswith(where[1])}
        assert {name: left[name] for name in left if name.partition("/")[0] not in _TO_GO_ON_FROM} == there, said


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_here_and_there(writing_shop: Workshop, tmp_path: Path, name: str) -> None:
    try_moments(writing_shop, tmp_path, COMMANDS[name], COMMANDS[name].stride, "kill")


@pytest.mark.parametrize("fate", ["interrupt", "full", "stuck"])
@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in _TAKES_LONG])
def test_it_befalls_here_and_there(writing_shop: Workshop, tmp_path: Path, name: str, fate: Fate) -> None:
    try_moments(writing_shop, tmp_path, COMMANDS[name], COMMANDS[name].stride * 3 * RARER[fate], fate)


@pytest.mark.hostile
@pytest.mark.parametrize("fate", CODES)
@pytest.mark.parametrize("name", COMMANDS)
def test_it_befalls_at_every_moment(writing_shop: Workshop, tmp_path: Path, name: str, fate: Fate) -> None:
    try_moments(writing_shop, tmp_path, COMMANDS[name], COMMANDS[name].hostile_stride * -(-RARER[fate] // 2), fate)


def test_ctrl_c_between_the_two_renames_gives_the_old_folder_back(
    writing_shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = shutil.copytree(writing_shop.root, tmp_path / "root")
    before = tree(root)

    def interrupted(_: Staging) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Staging, "_put", interrupted)
    for words in (COMMANDS["remove"].words, COMMANDS["build over"].words):
        code, said = run_in(root, words)
        assert code == 130
        assert "interrupted; nothing was left behind" in said
        assert tree(root) == before


def test_ctrl_c_once_all_is_in_its_place_asks_for_no_other_run(
    writing_shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = shutil.copytree(writing_shop.root, tmp_path / "root")

    def interrupted(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("modekit.files.staging.sync_folder", interrupted)
    code, said = run_in(root, COMMANDS["remove"].words)
    assert code == 130
    assert f"interrupted; THREE {_FINISHED}" in said and "to do:" not in said
    assert open_checkpoint(root / "THREE").names == ["medicine", "code"]
