"""What this user's modekit found out, kept where no folder that somebody else made can bring it.

    CACHE/known/<sha256 of what>    what was proven; of a file in some state, its blake3

CACHE is MODEKIT_CACHE, else XDG_CACHE_HOME/modekit, else ~/.cache/modekit. Whatever is wrong with it, nothing is known then: a
file is read again, and a proof is made again.
"""

from __future__ import annotations

import hashlib
import os
import stat
from contextlib import suppress
from pathlib import Path

from modekit.files.read import UNREADABLE
from modekit.files.write import make_folder, write_file

WRONG = (*UNREADABLE, RuntimeError)
"""What asking the cache raises; RuntimeError where the user has no home."""


def cache_folder() -> Path:
    """Where modekit keeps what it can make again. Raises RuntimeError where the user has no home."""
    chosen = os.environ.get("MODEKIT_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modekit"


def keep_proven(what: str, found: str = "") -> None:
    """Keep that something was proven here, or what was found of it."""
    with suppress(*WRONG):
        file = file_of(what)
        if not file.parent.exists():
            make_folder(file.parent)
            file.parent.chmod(stat.S_IRWXU)  # whatever the umask says
        write_file(file, found.encode(), sync=False)


def is_proven_here(what: str) -> bool:
    """Whether it was."""
    try:
        return file_of(what).is_file()
    except WRONG:
        return False


def file_of(what: str) -> Path:
    """A file of the cache. Raises OSError where its folder is a link, or another user may write into it."""
    path = cache_folder() / "known"
    with suppress(FileNotFoundError):
        status = path.lstat()
        others = status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if others or not stat.S_ISDIR(status.st_mode):
            raise PermissionError(f"{path} is not this user's alone")
    return path / hashlib.sha256(os.fsencode(what)).hexdigest()
