"""What this user's modekit has proven is known to this user's modekit alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from modekit.files.user_cache import is_proven_here, keep_proven


def test_what_was_proven_is_known_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEKIT_CACHE", str(tmp_path / "cache"))
    keep_proven("this")
    assert is_proven_here("this") and not is_proven_here("that")
    monkeypatch.setenv("MODEKIT_CACHE", str(tmp_path / "other"))
    assert not is_proven_here("this")


def test_a_cache_that_cannot_be_written_knows_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("no folder")
    monkeypatch.setenv("MODEKIT_CACHE", str(tmp_path / "cache"))
    keep_proven("this")
    assert not is_proven_here("this")
