"""Builds of different recipes into one folder at once: one of them says it is done, and the folder is that one's."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from conftest import Workshop
from modekit.building.build import build
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.checkpoint import open_checkpoint
from modekit.errors import OutputError
from modekit.files.output import work_folder
from modekit.planning.make import make_plan
from modekit.recipes.read import load_recipe
from refusal import Tree, borrow, tree

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


def race(shop: Workshop, pairs: int) -> dict[tuple[int, ...], int]:
    """How often each pair of ends came; every folder is checked."""
    plans, wanted = [], []
    for seed in (1, 2):
        path = shop.write(mixture={"router": {"fit": "random", "seed": seed}})
        plans.append(make_plan(load_recipe(path), shop.root))
        wanted.append(tree(shop.build(f"WANTED{seed}", mixture={"router": {"fit": "random", "seed": seed}})))
    ends: dict[tuple[int, ...], int] = {}
    out = shop.root / "OUT"
    for number in range(pairs):
        overwrite = number % 2 == 1
        if not overwrite or number % 4 == 1:
            shutil.rmtree(out, ignore_errors=True)
        processes = [starts(partial(build, plan, out, overwrite=overwrite)) for plan in plans]
        codes = tuple(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes)
        check(out, wanted, codes)
        ends[codes] = ends.get(codes, 0) + 1
    return ends


def check(out: Path, wanted: list[Tree], codes: tuple[int, ...]) -> None:
    assert CRASHED not in codes
    assert DONE in codes, "nobody got through"
    found = tree(out)
    assert found in [each for each, code in zip(wanted, codes, strict=True) if code == DONE]
    assert is_proven(verify(open_checkpoint(out), reload=False))
    assert not work_folder(out).exists()


def test_a_few_pairs(shop: Workshop) -> None:
    race(shop, 8)


@pytest.mark.slow
def test_two_hundred_pairs(shop: Workshop) -> None:
    ends = race(shop, 200)
    assert sum(ends.values()) == 200
    assert sum(count for codes, count in ends.items() if REFUSED in codes) > 20, ends  # they did meet
