"""A demo that is killed again and again goes on from what is finished, to the same table."""

from __future__ import annotations

from pathlib import Path

import pytest

import modekit.demo.seed as seed_module
from kills import dies
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.open import open_checkpoint
from modekit.demo.demo import run_demo
from modekit.run import Run, silent

_CHANGES = 211
"""Changes of a file between two kills: more than a mixture needs that is begun anew, few enough for several kills."""


@pytest.mark.hostile
def test_a_demo_killed_over_and_over_ends_with_the_same_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seed_module, "_side_by_side", lambda _real: (1, 1))  # in one process, where a kill is counted
    folder, kills = tmp_path / "demo", 0

    def demo() -> None:
        run_demo(folder, quick=True, run=Run(progress=silent))

    while dies(demo, folder, _CHANGES):
        kills += 1
        assert kills < 30, "it does not get on"
        for made in (path.parent for path in folder.glob("seed0/*/modekit.json")):
            assert is_proven(verify(open_checkpoint(made), reload=False)), made
    assert kills > 2
    assert not list(folder.rglob("*.partial"))
    again = run_demo(folder, quick=True, run=Run(progress=silent)).merged(0)
    whole = run_demo(tmp_path / "whole", quick=True, run=Run(progress=silent)).merged(0)
    assert [(row.name, row.scores) for row in again.rows] == [(row.name, row.scores) for row in whole.rows]
