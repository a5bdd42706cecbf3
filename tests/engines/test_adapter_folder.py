"""What workers are told of adapters that come and go."""

from __future__ import annotations

import os
from pathlib import Path

from modekit.engines.workers import Version


def test_every_version_has_a_spelling_of_its_own(tmp_path: Path) -> None:
    """All of them lead to the same folder, and the longest is a path that the system takes."""
    times = [0, 1, 2, 3, 1_764_190_000_123_456_789, 1_764_190_000_123_456_790, 2**63 - 1, -1, -(2**62)]
    spelled = [Version(tmp_path, written).spelling for written in times]
    assert len(set(spelled)) == len(times)
    assert all(os.path.samefile(each, tmp_path) for each in spelled)  # noqa: PTH121 - a Path would spell it anew
    assert max(map(len, spelled)) < len(str(tmp_path)) + 140
