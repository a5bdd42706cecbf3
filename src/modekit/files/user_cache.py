"""What this user's modekit found out about large files, kept where no folder that somebody else made can bring it.

    CACHE/digests/<path's sha256>.json   the blake3 of a file, and the state in which the file had it
    CACHE/proven/<sha256>                what was proven here; the name says it all

CACHE is MODEKIT_CACHE, else XDG_CACHE_HOME/modekit, else ~/.cache/modekit. Whatever is wrong with it, nothing is known then: a
file is read again, and a proof is made again.
"""

from __future__ import annotations

import hashlib
import os
import stat
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path

from pydantic import BaseModel

from modekit.files.read import UNREADABLE, FileState
from modekit.files.typed import Digest, read_as
from modekit.files.write import json_bytes, make_folder, remove, write_file

_MOST = 2_000
"""Entries of a folder: of more, those that were written longest ago go."""
_WRONG = (*UNREADABLE, RuntimeError)
"""What asking the cache raises; RuntimeError where the user has no home."""


class _Known(BaseModel):
    path: str
    state: tuple[int, ...]
    blake3: Digest


def cache_folder() -> Path:
    """Where modekit keeps what it can make again. Raises RuntimeError where the user has no home."""
    chosen = os.environ.get("MODEKIT_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modekit"


def known_digest(path: Path) -> str | None:
    """The blake3 of a file that was read before and has not changed since, by size, times and inode; else None."""
    try:
        known, now = read_as(_digest_file(path), _Known, 2**16), FileState.of_status(path.stat())
        return known.blake3 if known.path == os.path.realpath(path) and known.state == astuple(now) else None
    except _WRONG:
        return None


def keep_digest(path: Path, state: FileState, blake3: str) -> None:
    """Keep the blake3 of a file that was read in a state. Nothing is kept where that cannot be told for sure, or written."""
    with suppress(*_WRONG):
        now = FileState.of_status(path.stat())
        if now == state and now.is_settled:
            known = _Known(path=os.path.realpath(path), state=astuple(now), blake3=blake3)
            _keep(_digest_file(path), json_bytes(known.model_dump(mode="json")))


def keep_proven(what: str) -> None:
    """Keep that something was proven here."""
    with suppress(*_WRONG):
        _keep(_file_of("proven", what.encode()), b"")


def is_proven_here(what: str) -> bool:
    """Whether it was."""
    try:
        return _file_of("proven", what.encode()).is_file()
    except _WRONG:
        return False


def _digest_file(path: Path) -> Path:
    return _file_of("digests", os.fsencode(os.path.realpath(path)), ".json")


def _file_of(folder: str, what: bytes, suffix: str = "") -> Path:
    """A file of the cache. Raises OSError where its folder is a link, or another user may write into it."""
    path = cache_folder() / folder
    with suppress(FileNotFoundError):
        status = path.lstat()
        others = os.name != "nt" and (status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))
        if others or not stat.S_ISDIR(status.st_mode):
            raise PermissionError(f"{path} is not this user's alone")
    return path / f"{hashlib.sha256(what).hexdigest()}{suffix}"


def _keep(file: Path, content: bytes) -> None:
    if not file.parent.exists():
        make_folder(file.parent)
        file.parent.chmod(stat.S_IRWXU)  # whatever the umask says
    write_file(file, content, sync=False)
    files = list(file.parent.iterdir())
    if len(files) > _MOST:
        for old in sorted(files, key=lambda file: file.lstat().st_mtime_ns)[: len(files) - _MOST // 2]:
            remove(old)
