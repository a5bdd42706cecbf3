"""Promises 5 and 6: the same recipe gives the same bytes, killed at any moment or not, and nothing half-made looks whole.

Each killed build runs in a forked process that ends by `os._exit`: no handler runs, nothing is flushed, as with SIGKILL.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import Workshop, make_workshop, save, tiny_model
from modekit.building.build import build
from modekit.checkpoint.checkpoint import open_checkpoint
from modekit.errors import CheckpointError, OutputError
from modekit.files.marker import CHANGE_LOCK
from modekit.files.output import JOURNAL
from modekit.files.staging import Staging, staging
from modekit.planning.make import make_plan
from modekit.planning.plan import Plan
from modekit.recipes.read import load_recipe
from modekit.run import Run
from refusal import Tree, borrow, refuse, run_python, tree

KILLED = 9
RANDOM = {"router": {"fit": "random"}}
FITTED = {"router": {"fit": "centroid", "tokens_per_domain": 64, "keep_tokens": 8}}
Arm = Callable[[int], None]
"""Prepares this process to die at the n-th moment of a kind."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Models of one layer, read by every test."""
    return make_workshop(tmp_path_factory.mktemp("small"), num_hidden_layers=1)


@pytest.fixture
def bench(tmp_path: Path, small: Workshop) -> Workshop:
    """A recipe of two experts over the small models, in several shards."""
    workshop = borrow(small, tmp_path)
    workshop.recipe.update(experts=workshop.recipe["experts"][:2], output={"shard_size": "30KB"}, mixture=RANDOM)
    return workshop


def plan_of(workshop: Workshop, **changes: Any) -> Plan:
    return make_plan(load_recipe(workshop.write(**changes)), workshop.root)


def build_and_die(plan: Plan, out: Path, arm: Arm, count: int) -> bool:
    """Build in a process of its own that dies at the given moment; False when the build ended before it came."""
    process = os.fork()
    if process == 0:
        try:
            arm(count)
            build(plan, out, overwrite=True)
            os._exit(0)
        except BaseException:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert code in {0, KILLED}
    return code == KILLED


def at_record(before: Callable[[Staging, str], object] | None, after: Callable[[Staging, str], object] | None) -> Arm:
    """Die at the n-th journal line, before it is written or after."""

    def arm(count: int) -> None:
        record = Staging.record
        seen = 0

        def counting(stage: Staging, key: str, value: object) -> None:
            nonlocal seen
            seen += 1
            mine = seen == count
            if mine and before is not None:
                before(stage, key)
                os._exit(KILLED)
            record(stage, key, value)
            if mine and after is not None:
                after(stage, key)
                os._exit(KILLED)

        Staging.record = counting  # type: ignore[method-assign]

    return arm


def nothing(_stage: Staging, _key: str) -> None:
    pass


def tear_journal(stage: Staging, _key: str) -> None:
    path = stage.work / JOURNAL
    os.truncate(path, path.stat().st_size - 4)


def tear_shard(stage: Staging, key: str) -> None:
    if key.startswith("shard "):
        path = stage.folder / key.removeprefix("shard ")
        os.truncate(path, path.stat().st_size - 5)


RECORD_MOMENTS = {
    "after the line": at_record(None, nothing),
    "within the line": at_record(None, tear_journal),
    "between data and line": at_record(nothing, None),
    "within the data": at_record(tear_shard, None),
    "with the data lost": at_record(None, tear_shard),
}


def at_file_operation(out: Path) -> Arm:
    """Die before the n-th opening, renaming, making or removing of anything under OUT*."""
    operations = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.copyfile", "shutil.rmtree"}

    def arm(count: int) -> None:
        seen = 0

        def hook(event: str, args: tuple[Any, ...]) -> None:
            nonlocal seen
            if event in operations or (event == "open" and str(out) in str(args[0])):
                seen += 1
                if seen == count:
                    os._exit(KILLED)

        sys.addaudithook(hook)

    return arm


def every_kill(plan: Plan, out: Path, arm: Arm, least: int) -> Iterator[int]:
    """Kill a build at its first moment, its second, ... until it lives; `least` guards against a hook that sees nothing."""
    count = 1
    while build_and_die(plan, out, arm, count):
        yield count
        count += 1
    assert count > least


def assert_only(root: Path, names: set[str]) -> None:
    assert {path.name for path in root.iterdir()} == {"recipe.yaml", *names}


@pytest.fixture
def expected(bench: Workshop) -> Callable[..., Tree]:
    """Bytes of an uninterrupted build."""

    def uninterrupted(**changes: Any) -> Tree:
        return tree(bench.build("EXPECTED", **changes))

    return uninterrupted


@pytest.mark.parametrize("moment", RECORD_MOMENTS)
def test_a_build_killed_at_any_journal_line_ends_in_the_same_bytes(
    bench: Workshop, expected: Callable[..., Tree], moment: str
) -> None:
    whole, plan, out = expected(), plan_of(bench), bench.root / "OUT"
    lines = sum(len(shard.tensors) for shard in plan.shards) + len(set(plan.sources))
    assert len(plan.shards) > 1
    for _ in every_kill(plan, out, RECORD_MOMENTS[moment], lines):
        assert_only(bench.root, {"EXPECTED", "OUT.partial"})
        with pytest.raises(CheckpointError, match="run the same command again"):
            open_checkpoint(out)
        build(plan, out)
        assert tree(out) == whole
        assert_only(bench.root, {"EXPECTED", "OUT"})
        for path in sorted(out.iterdir()):
            path.unlink()
        out.rmdir()
    assert tree(out) == whole


@pytest.mark.parametrize(
    ("mixture", "stride"), [(RANDOM, 4), (RANDOM, 1), (FITTED, 1)], ids=["random here and there", "random", "fitted"]
)
def test_a_build_killed_at_any_file_operation_ends_in_the_same_bytes(
    bench: Workshop, expected: Callable[..., Tree], mixture: dict[str, Any], stride: int
) -> None:
    whole, plan = expected(mixture=mixture), plan_of(bench, mixture=mixture)
    finished = 0
    for count in range(1, 1000, stride):
        out = bench.root / f"OUT{count}"
        if not build_and_die(plan, out, at_file_operation(out), count):
            break
        if out.exists():
            finished += 1
            open_checkpoint(out)  # clears away what is left of the work
        else:
            build(plan, out)
        assert tree(out) == whole
        assert not out.with_name(out.name + ".partial").exists()
    assert count > 20
    assert 1 <= finished < 10


def test_a_build_killed_twice(bench: Workshop, expected: Callable[..., Tree]) -> None:
    whole, plan, out = expected(), plan_of(bench), bench.root / "OUT"
    for count in (9, 6, 4):
        assert build_and_die(plan, out, RECORD_MOMENTS["within the line"], count)
    build(plan, out)
    assert tree(out) == whole


def test_what_the_journal_knows_is_not_written_again(bench: Workshop) -> None:
    plan, out = plan_of(bench), bench.root / "OUT"
    assert build_and_die(plan, out, RECORD_MOMENTS["after the line"], 12)
    lines = (out.with_name("OUT.partial") / JOURNAL).read_text().splitlines()[1:]
    known = sum(not line.startswith('["synced ') for line in lines)
    done: list[int] = []

    def report(stage: str, done_now: int, total: int) -> None:
        done.extend([done_now] if stage == "build" else [])

    build(plan, out, run=Run(progress=report))
    total = sum(len(shard.tensors) for shard in plan.shards)
    assert len(lines) == 12
    assert known > 9
    assert len(done) - 1 <= total + len(set(plan.sources)) - known


def test_killing_the_replacement_of_an_old_folder_loses_neither(bench: Workshop, expected: Callable[..., Tree]) -> None:
    new, out = expected(), bench.root / "OUT"
    seeded = {"mixture": {"router": {"fit": "random", "seed": 7}}}
    old = tree(bench.build("OLD", **seeded))
    assert old != new
    plan = plan_of(bench)
    between = 0
    for count in range(1, 1000):
        bench.build("OUT", **seeded)
        bench.write()
        killed = build_and_die(plan, out, at_file_operation(out), count)
        if not out.exists():
            between += 1
            (bench.root / "OUT.partial" / "old" / CHANGE_LOCK).unlink()  # held while the new one takes its place
            assert tree(bench.root / "OUT.partial" / "old") == old
            with pytest.raises(OutputError, match="the output folder exists"):
                build(plan, out)
            assert tree(out) == old
        (out / CHANGE_LOCK).unlink(missing_ok=True)  # held by nobody
        assert tree(out) in (old, new)
        if not killed:
            break
        with pytest.raises(OutputError, match="the output folder exists"):
            build(plan, out)
        assert not (bench.root / "OUT.partial" / "old").exists()
        build(plan, out, overwrite=True)
        assert tree(out) == new
        assert_only(bench.root, {"EXPECTED", "OLD", "OUT"})
    assert between == 1
    assert count > 20
    assert tree(out) == new


def test_sigkill_and_the_same_command_again(bench: Workshop, expected: Callable[..., Tree]) -> None:
    whole, recipe, out = expected(), bench.write(), bench.root / "OUT"
    run = "import sys; from modekit.cli import main; sys.argv = ['modekit', *sys.argv[1:]]; main()"
    kill = (
        "import os, signal, modekit.files.staging\n"
        "record = modekit.files.staging.Staging.record\n"
        "def last(stage, key, value):\n"
        "    record(stage, key, value)\n"
        "    'expert-00001' in key and os.kill(os.getpid(), signal.SIGKILL)\n"
        "modekit.files.staging.Staging.record = last\n"
    )
    assert run_python(kill + run, "build", recipe, out).returncode == -9
    assert_only(bench.root, {"EXPECTED", "OUT.partial"})
    assert "run the same command again" in refuse("verify", out)
    assert run_python(run, "build", recipe, out).returncode == 0
    assert tree(out) == whole


# Starting over


def test_a_source_that_changed_after_the_kill(bench: Workshop, small: Workshop) -> None:
    law = save(tiny_model(seed=1, num_hidden_layers=1), bench.root / "law")
    bench.recipe["experts"][1]["model"] = "./law"
    out = bench.root / "OUT"
    assert build_and_die(plan_of(bench), out, RECORD_MOMENTS["after the line"], 15)
    save(tiny_model(seed=8, num_hidden_layers=1), law)
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
    assert build_and_die(plan_of(bench), out, RECORD_MOMENTS["after the line"], 15)
    build(plan_of(bench, **changes), out)
    assert tree(out) == tree(bench.build("FRESH", **changes))
    assert not (bench.root / "OUT.partial").exists()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"another digest\n", b"{}"])
def test_a_damaged_journal(bench: Workshop, expected: Callable[..., Tree], content: bytes) -> None:
    whole, plan, out = expected(), plan_of(bench), bench.root / "OUT"
    assert build_and_die(plan, out, RECORD_MOMENTS["after the line"], 15)
    (bench.root / "OUT.partial" / JOURNAL).write_bytes(content)
    build(plan, out)
    assert tree(out) == whole


def test_a_journal_with_a_line_of_nonsense(bench: Workshop, expected: Callable[..., Tree]) -> None:
    whole, plan, out = expected(), plan_of(bench), bench.root / "OUT"
    for nonsense in ("3", "[]", "null", '["shard model-backbone-00001.safetensors"]', '["shard'):
        assert build_and_die(plan, out, RECORD_MOMENTS["after the line"], 15)
        with (bench.root / "OUT.partial" / JOURNAL).open("a") as journal:
            journal.write(nonsense + "\n")
        build(plan, out, overwrite=True)
        assert tree(out) == whole


# The same recipe twice


@pytest.mark.parametrize(
    "mixture",
    [
        RANDOM,
        {"method": "linear", "weights": {"medicine": 1, "law": 2}},
        {"method": "gating", **FITTED, "backbone": "average"},
        *(
            {"router": {**FITTED["router"], "fit": fit}, "backbone": "slerp"}
            for fit in ("centroid", "lda", "logistic", "ridge")
        ),
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


def test_a_lock_dies_with_its_process_and_holds_nobody_up(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path\n"
        "from modekit.files.staging import Staging\n"
        "Staging(Path(sys.argv[1]), 'mine', 'model', replace='nothing', sync=True)\n"
        "os._exit(9)\n"
    )
    assert run_python(code, tmp_path / "OUT").returncode == KILLED
    with staging(tmp_path / "OUT", "mine", "model") as stage:
        (stage.folder / "record").write_text("mine")
    assert {path.name for path in (tmp_path / "OUT").iterdir()} == {".modekit", "record"}
    (tmp_path / "LEFT.partial").mkdir()
    (tmp_path / "LEFT.partial" / "lock").touch()  # a kill before the journal was begun
    with staging(tmp_path / "LEFT", "mine", "model"):
        pass
    assert {path.name for path in (tmp_path / "LEFT").iterdir()} == {".modekit"}
