"""Whether files and settings are what they were: blake3 of weight files, read once while they stay; sha256 of a config."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path

from blake3 import blake3

from modekit.files.read import read_text
from modekit.files.user_cache import WRONG, file_of, keep_proven
from modekit.sources.config import Config
from modekit.sources.contents import WeightFile
from modekit.sources.header import FileState

YOUNG_NS = 2 * 10**9
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NO_SETTINGS = frozenset(
    {"_name_or_path", "transformers_version", "peft_version", "base_model_name_or_path", "revision", "quantization_config"}
)


def settings_digest(config: Config) -> str:
    """Changes with what a model's or adapter's config makes of its weights; who saved it, and where, does not count."""
    said = {key: value for key, value in config.items() if key not in _NO_SETTINGS}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def blake3_of(path: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> str:
    """A file's hash, read now; `progress` is told the bytes so far and in all. Raises SourceError."""
    file, digest, done = WeightFile(path), blake3(), 0
    try:
        for chunk in file.chunks(0, file.state.size):
            digest.update(chunk)
            done += len(chunk)
            progress(done, file.state.size)
        file.check_unchanged()
    finally:
        file.close()
    found: str = digest.hexdigest()
    keep_digest(path, file.state, found)
    return found


def known_blake3(path: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> str:
    """A file's hash; a file that was read before is not read again while its size, times and inode are what they were.

    Raises SourceError.
    """
    return known_digest(path) or blake3_of(path, progress)


def known_digest(path: Path) -> str | None:
    """The blake3 of a file that was read before and has not changed since, by size, times and inode; else None."""
    try:
        found = read_text(file_of(_in_state(path, FileState.of(path))), 2**10)
        return found if _DIGEST.fullmatch(found) else None
    except WRONG:
        return None


def keep_digest(path: Path, state: FileState, blake3: str) -> None:
    """Keep the blake3 of a file that was read in a state. Nothing is kept where that cannot be told for sure, or written."""
    with suppress(*WRONG):
        now = FileState.of(path)
        if now == state and is_settled(now):
            keep_proven(_in_state(path, now), blake3)


def is_settled(state: FileState) -> bool:
    """Whether it changed long enough ago that another change would show: within a tick of the clock it would not."""
    return max(state.modified_ns, state.changed_ns) < time.time_ns() - YOUNG_NS


def _in_state(path: Path, state: FileState) -> str:
    return f"{os.path.realpath(path)} {astuple(state)}"
