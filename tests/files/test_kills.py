"""Every command, killed before the n-th change of a file: the old or the new is whole, and the same command goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from conftest import Workshop
from kills import dies
from refusal import tree
from writing_commands import COMMANDS, Command, check_whole, run_in, stable


def try_kills(writing_shop: Workshop, tmp_path: Path, command: Command, stride: int) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(writing_shop.root, whole)
    assert run_in(whole, command.words)[0] == 0
    wanted = stable(tree(whole))
    for moment in range(1, 5000, stride):
        root = tmp_path / f"at{moment}"
        shutil.copytree(writing_shop.root, root)

        def work(root: Path = root) -> None:
            code, said = run_in(root, command.words)
            assert code == 0, said

        if not dies(work, root, moment):
            assert moment > command.least, "the hook saw too little"
            assert stable(tree(root)) == wanted
            return
        check_whole(root)
        left = {name: content for name, content in stable(tree(root)).items() if name.partition("/")[0] != command.work}
        done = bool(command.work) and left == wanted
        code, said = run_in(root, command.words)
        assert code == 0, f"{moment}: {said}"
        found = stable(tree(root))
        assert found.keys() == wanted.keys(), f"{moment}: {sorted(found.keys() ^ wanted.keys())}"
        different = [name for name in wanted if found[name] != wanted[name] and not done]
        assert not different, f"{moment}: {different}"
        shutil.rmtree(root)


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_here_and_there(writing_shop: Workshop, tmp_path: Path, name: str) -> None:
    try_kills(writing_shop, tmp_path, COMMANDS[name], COMMANDS[name].stride)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_all_moments(writing_shop: Workshop, tmp_path: Path, name: str) -> None:
    try_kills(writing_shop, tmp_path, COMMANDS[name], COMMANDS[name].slow_stride)
