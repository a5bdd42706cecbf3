"""What this user's modekit has proven, kept where no folder that somebody else made can bring it.

    CACHE/known/<sha256 of a claim>    an empty file: the claim was proven

CACHE is MODEKIT_CACHE, else XDG_CACHE_HOME/modekit, else ~/.cache/modekit. Whatever is wrong with it, a proof is made again.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from modekit.files.read import UNREADABLE
from modekit.files.write import make_folder, write_file

_WRONG = (*UNREADABLE, RuntimeError)
"""What asking the cache raises; RuntimeError where the user has no home."""


def cache_folder() -> Path:
    """Where modekit keeps what it can make again. Raises RuntimeError where the user has no home."""
    chosen = os.environ.get("MODEKIT_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modekit"


def keep_proven(claim: str) -> None:
    """Keep that something was proven here; where nothing can be written, it is proven again."""
    with suppress(*_WRONG):
        file = _file_of(claim)
        make_folder(file.parent)
        write_file(file, b"", sync=False)


def is_proven_here(claim: str) -> bool:
    """Whether it was."""
    try:
        return _file_of(claim).is_file()
    except _WRONG:
        return False


def _file_of(claim: str) -> Path:
    return cache_folder() / "known" / hashlib.sha256(os.fsencode(claim)).hexdigest()
