"""Checkpoints that commit f5be87a wrote still open, verify, say the same and take a new router."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import golden
from golden_recipes import OLD
from golden_sources import write_sources
from modekit.building.verify import Check, verify
from modekit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from modekit.routing.refit import refit

HERE = Path(__file__).parent / "old"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the models that the old checkpoints were made of, as they were."""
    return write_sources(tmp_path_factory.mktemp("old") / "sources", layers=1).parent


@pytest.fixture(params=OLD)
def old(request: pytest.FixtureRequest, sources: Path, tmp_path: Path) -> Checkpoint:
    """An old checkpoint, opened, beside its sources."""
    shutil.copytree(sources, tmp_path, dirs_exist_ok=True)
    shutil.copytree(HERE / "checkpoints" / request.param, tmp_path / "checkpoints" / request.param)
    return open_checkpoint(tmp_path / "checkpoints" / request.param)


def is_proven(check: Check) -> bool:
    """Whether a check holds; the code that lies beside an old checkpoint may be of its own version."""
    return check.verdict == "proven" or check.name == "code that opens it"


def test_it_verifies(old: Checkpoint) -> None:
    assert [check for check in verify(old) if not is_proven(check)] == []


def test_it_says_the_same(old: Checkpoint) -> None:
    wanted = load_file(HERE / "logits.safetensors")[old.folder.name]
    # Float32 sums of some dozens of products, in the order of the processor at hand.
    np.testing.assert_allclose(golden.logits_of(old.folder), wanted, rtol=1e-4, atol=1e-4)


def test_it_takes_a_new_router_from_the_statistics_that_it_keeps(old: Checkpoint) -> None:
    shutil.rmtree(old.folder.parents[1] / "sources" / "text")
    before = old.gates()
    refit(old, {"router": {"temperature": 2.0}})
    again = open_checkpoint(old.folder)
    assert all(is_proven(check) for check in verify(again))
    for gate, old_gate in zip(again.gates(), before, strict=True):
        # Solved anew from the same sums, and rounded to the checkpoint's bfloat16 or float16 (2^-9 of each number).
        np.testing.assert_allclose(2 * gate, old_gate, rtol=2**-7, atol=1e-3 * np.abs(old_gate).max())
