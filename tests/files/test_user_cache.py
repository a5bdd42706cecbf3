"""What a user's cache says of files is believed only while it is the user's, and the files are what they were."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from modekit.files.user_cache import is_proven_here, keep_proven
from modekit.sources import digests
from modekit.sources.digests import blake3_of, known_blake3, known_digest

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="permissions are others there")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MODEKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "YOUNG_NS", -(10**18))  # no file of a test is old
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"a" * 1_000)
    return path


def test_a_file_is_read_once(cache: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = known_blake3(file)
    assert digest == blake3_of(file)
    monkeypatch.setattr(digests, "blake3_of", lambda *_: pytest.fail("read again"))
    assert known_blake3(file) == digest


def test_any_change_is_noticed(cache: Path, file: Path) -> None:
    digest = known_blake3(file)
    before = file.stat()
    file.write_bytes(b"b" * 1_000)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # nobody can set the time of the last change of this
    assert known_digest(file) is None and known_blake3(file) != digest
    other = file.with_name("other")
    other.write_bytes(b"c" * 1_000)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(file)
    assert known_digest(file) is None


def test_of_a_file_that_changed_just_now_nothing_is_kept(cache: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within one tick of the clock it may change again, under the same time."""
    monkeypatch.setattr(digests, "YOUNG_NS", 2 * 10**9)
    blake3_of(file)
    assert known_digest(file) is None
    past = time.time() - 10
    os.utime(file, (past, past))
    blake3_of(file)
    assert known_digest(file) is None  # it was changed now, whatever time it says


@pytest.mark.parametrize("damage", ["", "[", "null", "[]", "{}", '{"path": 3}', "\0" * 100, "x" * 10**6])
def test_damage_means_that_nothing_is_known(cache: Path, file: Path, damage: str) -> None:
    digest = known_blake3(file)
    (kept,) = (cache / "known").iterdir()
    kept.write_text(damage)
    assert known_digest(file) is None and known_blake3(file) == digest == known_digest(file)


@POSIX
def test_what_others_may_write_is_not_believed(cache: Path, file: Path) -> None:
    known_blake3(file)
    keep_proven("this")
    assert known_digest(file) is not None and is_proven_here("this") and not is_proven_here("that")
    (cache / "known").chmod(0o777)
    assert known_digest(file) is None and not is_proven_here("this")
    (cache / "known").chmod(0o700)
    (cache / "known").rename(cache / "elsewhere")
    (cache / "known").symlink_to(cache / "elsewhere")
    assert known_digest(file) is None and not is_proven_here("this")


@POSIX
def test_a_lax_umask_makes_no_lax_folder(cache: Path, file: Path) -> None:
    before = os.umask(0)
    try:
        known_blake3(file)
        keep_proven("this")
    finally:
        os.umask(before)
    assert known_digest(file) is not None and is_proven_here("this")
    assert (cache / "known").stat().st_mode & 0o777 == 0o700
