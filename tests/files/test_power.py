"""A power loss: what was not yet on the disk is gone. The old or the new is whole, and the same command goes on.

Names outlive the loss in the order in which they were given, as journalling file systems keep them; the bytes of a file do
only when somebody waited for them (fsync). `make test` tries some moments, `make test-hostile` each.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import Workshop
from kills import Sizes, dies
from modekit.building.build import build
from modekit.checkpoint.open import open_checkpoint
from modekit.planning.plan import Plan
from modekit.routing.fit import refit
from modekit.run import Run
from refusal import borrow, tree

FITTED = {"router": {"fit": "centroid", "tokens_per_domain": 64, "keep_tokens": 8}}


def cut_off(below: Path, synced: Sizes, *, keep: tuple[str, ...] = (), zeros: bool = False) -> None:
    """Every file ends where the disk has it; with `zeros` it has its length, but nothing in it from there on."""
    for file in below.rglob("*"):
        if not file.is_file() or file.is_symlink() or file.name in keep:
            continue
        size, length = synced.get(file.stat().st_ino, 0), file.stat().st_size
        if size < length:
            os.truncate(file, size)
            if zeros:
                os.truncate(file, length)


LOSSES: dict[str, Callable[[Path, Sizes], None]] = {
    "cut off": cut_off,
    "zeros": lambda below, synced: cut_off(below, synced, zeros=True),
    "but the journal": lambda below, synced: cut_off(below, synced, keep=("journal",), zeros=True),
}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, small_workshop: Workshop) -> Workshop:
    """Two recipes' worth of models, and OUT, built from one of them."""
    made = borrow(small_workshop, tmp_path_factory.mktemp("power"), 2)
    made.recipe["output"] = {"shard_size": "30KB"}
    made.build("OLD")
    made.build("NEW", mixture=FITTED)
    return made


def new_plan(shop: Workshop) -> Plan:
    return shop.plan(mixture=FITTED)


def lose_power(
    shop: Workshop,
    loss: str,
    stride: int,
    monkeypatch: pytest.MonkeyPatch,
    *,
    over_old: bool,
    sync: bool = True,
    first: int = 1,
) -> int:
    """How many moments there were; after each, what is at OUT is checked, and the same build goes on."""
    plan, new, old, out = new_plan(shop), tree(shop.root / "NEW"), tree(shop.root / "OLD"), shop.root / "OUT"
    for left in (out, out.with_name("OUT.partial")):
        shutil.rmtree(left, ignore_errors=True)
    begin = {path.name for path in shop.root.iterdir()}
    for moment in range(first, 2000, stride):
        if over_old:
            shutil.copytree(shop.root / "OLD", out)
        lives = not dies(lambda: build(plan, out, overwrite=True, run=Run(sync=sync)), shop.root, moment, lose=LOSSES[loss])
        if not lives:
            if out.exists():
                (out / ".modekit.lock").unlink(missing_ok=True)
                assert tree(out) in ([old, new] if over_old else [new]), moment
            build(plan, out, overwrite=True)
        assert tree(out) == new, moment
        assert {path.name for path in shop.root.iterdir()} == begin | {"OUT"}
        shutil.rmtree(out)
        if lives:
            return moment
    raise AssertionError("it never ends")


@pytest.mark.parametrize("over_old", [False, True], ids=["new", "over an old one"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_build(shop: Workshop, monkeypatch: pytest.MonkeyPatch, loss: str, over_old: bool) -> None:
    assert lose_power(shop, loss, 17, monkeypatch, over_old=over_old) > 50


@pytest.mark.hostile
@pytest.mark.parametrize("over_old", [False, True], ids=["new", "over an old one"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_build_at_every_moment(shop: Workshop, monkeypatch: pytest.MonkeyPatch, loss: str, over_old: bool) -> None:
    assert lose_power(shop, loss, 1, monkeypatch, over_old=over_old) > 50


def test_who_does_not_wait_for_the_disk_may_lose_what_is_there(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError):  # which shows that these tests see it
        lose_power(shop, "zeros", 1, monkeypatch, over_old=False, sync=False, first=44)  # about when OUT gets its name


@pytest.mark.parametrize("loss", ["cut off", "zeros"])
def test_a_fit(shop: Workshop, loss: str) -> None:
    root = shop.root / "fits"
    root.mkdir()
    whole = shutil.copytree(shop.root / "OLD", root / "WHOLE")
    old, changes = tree(whole), {"method": "linear"}
    refit(open_checkpoint(whole), changes)
    new, out = tree(whole), root / "OUT"
    for moment in range(1, 1000):
        shutil.copytree(shop.root / "OLD", out)
        if not dies(lambda: refit(open_checkpoint(out), changes), root, moment, lose=LOSSES[loss]):
            break
        opened = open_checkpoint(out)
        (out / ".modekit.lock").unlink(missing_ok=True)
        for left in out.glob(".modekit.*.tmp"):
            shutil.rmtree(left)
        assert tree(out) in (old, new), moment
        refit(opened, changes)
        assert tree(out) == new, moment
        shutil.rmtree(out)
    assert moment > 15
    shutil.rmtree(root)
