"""Commands at one folder at once: what is there in the end is what one of them made, or both of them one after the other."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from conftest import Workshop
from kills import befallen, exit_code
from modekit.errors import OutputError
from refusal import Tree, borrow, tree
from writing_commands import COMMANDS, check_whole, run_in, stable

DONE, REFUSED, CRASHED = 0, 2, 3


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, small_workshop: Workshop) -> Workshop:
    made = borrow(small_workshop, tmp_path_factory.mktemp("two"), 2)
    made.recipe["output"] = {"shard_size": "30KB"}
    return made


def starts(work: Callable[[], object]) -> int:
    """The work in a process of its own; its number."""
    process = os.fork()
    if process == 0:
        try:
            work()
            os._exit(DONE)
        except OutputError:
            os._exit(REFUSED)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(CRASHED)
    return process


RACES: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "two that make one output": (COMMANDS["extract"].words, COMMANDS["specialize"].words),
    "remove against remove": (("remove", "THREE", "medicine"), ("remove", "THREE", "law")),
    "fit while it is evaluated": (COMMANDS["fit"].words, COMMANDS["eval"].words),
    "add against replace": (COMMANDS["add"].words, COMMANDS["replace"].words),
    "train against fit": (COMMANDS["train gates"].words, COMMANDS["fit"].words),
    "report against itself": (COMMANDS["report"].words, COMMANDS["report"].words),
    "a command against its clean-up": (COMMANDS["build"].words, COMMANDS["build"].words),
}


def run_one_by_one(shop: Workshop, tmp_path: Path, words: Sequence[Sequence[str]]) -> list[Tree]:
    """What may be there in the end: what each makes alone, and both in either order."""
    found = []
    for number, order in enumerate((words[:1], words[1:], words, words[::-1])):
        root = shutil.copytree(shop.root, tmp_path / f"one by one {number}")
        for each in order:
            run_in(root, each)
        found.append(outputs(root))
        shutil.rmtree(root)
    return found


def outputs(root: Path) -> Tree:
    """Without the states of a training that was refused in the end: it would go on from them."""
    return {name: content for name, content in stable(tree(root)).items() if name.partition("/")[0] != "OUT.training"}


def run_at_once(shop: Workshop, tmp_path: Path, name: str, races: int) -> None:
    words = RACES[name]
    wanted = run_one_by_one(shop, tmp_path, words)
    for number in range(races):
        root = shutil.copytree(shop.root, tmp_path / f"at once {number}")
        came = "clean-up" not in name or befallen(partial(run_in, root, words[0]), root, 20 + 11 * number, "kill").came
        if not came or ("clean-up" in name and (root / words[0][-1]).exists()):
            assert number > 3, "the hook saw too little"
            return  # all was in its place by then, so that both find a whole folder

        def run(place: int, root: Path = root, pause: float = 0.02 * (number % 8)) -> None:
            time.sleep(pause * place)
            code, said = run_in(root, words[place])
            if code == 2:
                raise OutputError(said)
            assert code == 0, said

        codes = [exit_code(process) for process in [starts(partial(run, place)) for place in (0, 1)]]
        assert CRASHED not in codes, number
        assert DONE in codes, f"{number}: nobody got through"
        check_whole(root)
        found = outputs(root)
        assert found in wanted, f"{number}: {codes} {[_different(found, each) for each in wanted]}"
        shutil.rmtree(root)


def _different(one: Tree, other: Tree) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name, "-") != other.get(name, "-"))


@pytest.mark.parametrize("name", list(RACES)[:3])
def test_a_race_of_two_commands(writing_shop: Workshop, tmp_path: Path, name: str) -> None:
    run_at_once(writing_shop, tmp_path, name, 1)


@pytest.mark.hostile
@pytest.mark.parametrize("name", RACES)
def test_fifteen_races_of_two_commands(writing_shop: Workshop, tmp_path: Path, name: str) -> None:
    run_at_once(writing_shop, tmp_path, name, 15)
