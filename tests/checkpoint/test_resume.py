"""Promises 5 and 6: the same recipe gives the same bytes, killed within any tensor or not, and nothing half-made looks whole.

Each killed build runs in a forked process that ends by `os._exit`: no handler runs, nothing is flushed, as with SIGKILL.
files/test_kills.py kills it at every change of a file.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import modekit.building.build as building
from conftest import Workshop, save, tiny_model
from kills import KILLED, exit_code
from modekit.building.build import build
from modekit.checkpoint.open import open_checkpoint
from modekit.errors import CheckpointError
from modekit.files.output import JOURNAL
from modekit.planning.make import make_plan
from modekit.planning.plan import Plan
from modekit.planning.reuse import digest_of
from modekit.recipes.read import load_recipe
from modekit.run import Run
from refusal import borrow, run_python, tree

RANDOM = {"router": {"fit": "random"}}
FITTED = {"router": {"fit": "centroid", "tokens_per_domain": 64, "keep_tokens": 8}}


@pytest.fixture
def bench(tmp_path: Path, small_workshop: Workshop) -> Workshop:
    """A recipe of two experts over the small models, in several shards."""
    workshop = borrow(small_workshop, tmp_path)
    workshop.recipe.update(experts=workshop.recipe["experts"][:2], output={"shard_size": "30KB"}, mixture=RANDOM)
    return workshop


def plan_of(workshop: Workshop, **changes: Any) -> Plan:
    return make_plan(load_recipe(workshop.write(**changes)), workshop.root)


def dies(plan: Plan, out: Path, count: int, *, sync: bool = True) -> bool:
    """Build in a process of its own that dies within the count-th tensor; False when the build ended before it came."""
    process = os.fork()
    if process == 0:
        try:
            building.write_tensor = partial(_torn, building.write_tensor, [], count)
            build(plan, out, overwrite=True, run=Run(sync=sync))
            os._exit(0)
        except BaseException:
            os._exit(1)
    code = exit_code(process)
    assert code in {0, KILLED}
    return code == KILLED


def _torn(write_tensor: Callable[..., None], seen: list[int], count: int, *args: Any) -> None:
    seen.append(1)
    if len(seen) == count:
        args[-1].write(b"torn")
        time.sleep(0.2)  # so that the disk has the shards before
        os._exit(KILLED)
    write_tensor(*args)


def test_a_build_killed_within_any_tensor_ends_in_the_same_bytes(bench: Workshop) -> None:
    whole, plan = tree(bench.build("EXPECTED")), plan_of(bench)
    assert len(plan.shards) > 1
    for count in range(1, 1000, 3):
        out = bench.root / f"OUT{count}"
        if not dies(plan, out, count):
            break
        with pytest.raises(CheckpointError, match=r"modekit\.json is missing"):
            open_checkpoint(out)
        build(plan, out)
        assert tree(out) == whole
        assert not out.with_name(out.name + ".partial").exists()
    assert count > 12


def test_whole_shards_are_not_written_again(bench: Workshop) -> None:
    whole, plan, out = tree(bench.build("EXPECTED")), plan_of(bench), bench.root / "OUT"
    tensors = [len(shard.tensors) for shard in plan.shards]
    assert dies(plan, out, sum(tensors))
    journal = (out.with_name("OUT.partial") / JOURNAL).read_text().splitlines()
    assert journal == [digest_of(plan), *(shard.file for shard in plan.shards[: len(journal) - 1])] and len(journal) > 2
    shutil.copytree(out.with_name("OUT.partial"), bench.root / "LEFT")
    for damage in (None, "cut", "another command"):
        shutil.rmtree(out, ignore_errors=True)
        if damage is not None:
            shutil.copytree(bench.root / "LEFT", out.with_name("OUT.partial"))
        if damage == "cut":  # whatever the journal says, its size tells
            os.truncate(out.with_name("OUT.partial") / "new" / journal[1], 100)
        elif damage == "another command":
            (out.with_name("OUT.partial") / JOURNAL).write_bytes(b"\xff")
        done: list[int] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(building, "write_tensor", partial(_torn, building.write_tensor, done, 0))
            build(plan, out)
        kept = len(journal) - 1 - (damage == "cut") if damage != "another command" else 0
        assert len(done) == sum(tensors) - sum(tensors[1 : 1 + kept] if damage == "cut" else tensors[:kept])
        assert tree(out) == whole


def test_without_waiting_for_the_disk_a_killed_build_begins_again(bench: Workshop) -> None:
    whole, plan, out = tree(bench.build("EXPECTED")), plan_of(bench), bench.root / "OUT"
    assert dies(plan, out, 15, sync=False)
    assert (out.with_name("OUT.partial") / JOURNAL).read_text().splitlines() == [digest_of(plan)]
    build(plan, out)
    assert tree(out) == whole


# Starting over


def test_a_source_that_changed_in_place_and_says_the_old_time(bench: Workshop) -> None:
    law = save(tiny_model(seed=1, num_hidden_layers=1), bench.root / "law") / "model.safetensors"
    bench.recipe["experts"][1]["model"] = "./law"
    out, before = bench.root / "OUT", law.stat()
    plan = plan_of(bench)
    assert dies(plan, out, sum(len(shard.tensors) for shard in plan.shards))
    other = save(tiny_model(seed=8, num_hidden_layers=1), bench.root / "other") / "model.safetensors"
    with law.open("r+b") as stream:
        stream.write(other.read_bytes())
    os.utime(law, ns=(before.st_atime_ns, before.st_mtime_ns))
    build(plan_of(bench), out)
    assert tree(out) == tree(bench.build("FRESH"))


@pytest.mark.parametrize(
    "changes",
    [
        {"mixture": {"router": {"fit": "random"}, "backbone": "average"}},
        {"mixture": {"router": {"fit": "random", "seed": 3}}},
        {"output": {"dtype": "bfloat16", "shard_size": "30KB"}},
        {"output": {"shard_size": "40KB"}},
    ],
)
def test_a_recipe_that_changed_after_the_kill(bench: Workshop, changes: dict[str, Any]) -> None:
    out = bench.root / "OUT"
    assert dies(plan_of(bench), out, 15)
    build(plan_of(bench, **changes), out)
    assert tree(out) == tree(bench.build("FRESH", **changes))
    assert not (bench.root / "OUT.partial").exists()


# The same recipe twice


@pytest.mark.parametrize(
    "mixture",
    [
        RANDOM,
        {"method": "linear", "weights": {"medicine": 1, "law": 2}},
        {"method": "gating", **FITTED, "backbone": "average"},
        *({"router": {**FITTED["router"], "fit": fit}, "backbone": "ties"} for fit in ("centroid", "logistic")),
    ],
)
def test_the_same_recipe_twice_gives_the_same_bytes(bench: Workshop, mixture: dict[str, Any]) -> None:
    first, second = bench.build("FIRST", mixture=mixture), bench.build("SECOND", mixture=mixture)
    assert tree(first) == tree(second)
    assert "journal" not in tree(first)
    index = json.loads((first / "model.safetensors.index.json").read_text())
    assert {path.name for path in first.glob("*.safetensors")} == set(index["weight_map"].values())


# Two processes at once


NO_FCNTL = "import sys; sys.modules['fcntl'] = None\n"


@pytest.mark.parametrize("system", ["", NO_FCNTL], ids=["here", "without fcntl"])
def test_a_folder_that_is_being_written_is_left_to_its_writer(tmp_path: Path, system: str) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from modekit.files.staging import staging\n"
        "from modekit.errors import OutputError\n"
        "out = Path(sys.argv[1])\n"
        "with staging(out, 'mine', 'model') as stage:\n"
        "    (stage.folder / 'record').write_text('mine')\n"
        "    for digest in ('mine', 'yours'):\n"
        "        try:\n"
        "            with staging(out, digest, 'model'):\n"
        "                raise SystemExit('two at once')\n"
        "        except OutputError as error:\n"
        "            assert 'another process is writing' in str(error), error\n"
        "    assert (stage.folder / 'record').exists()\n"
    )
    ended = run_python(system + code, tmp_path / "OUT")
    assert ended.returncode == 0, ended.stderr
    assert {path.name for path in (tmp_path / "OUT").iterdir()} == {".modekit", "record"}  # no journal and no lock
    assert {path.name for path in tmp_path.iterdir()} == {"OUT"}
