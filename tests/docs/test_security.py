"""docs/security.md names a test for every line that it promises, and each of them is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py(?:::\w+)?)`", (ROOT / "docs" / "security.md").read_text(encoding="utf-8"))))


@pytest.mark.parametrize("named", NAMED)
def test_the_test_is_there(named: str) -> None:
    file, _, name = named.partition("::")
    assert (ROOT / file).is_file()
    assert not name or f"\ndef {name}(" in (ROOT / file).read_text(encoding="utf-8")


def test_every_row_names_one() -> None:
    rows = [line for line in (ROOT / "docs" / "security.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    without = [row for row in rows if "`tests/" not in row and "held by" not in row]
    assert without == []
    assert len(NAMED) > 25
