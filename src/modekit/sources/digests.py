"""Whether files and settings are what they were: blake3 of weight files, sha256 of a config."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

from blake3 import blake3

from modekit.files.write import digest_of_data
from modekit.sources.config import Config
from modekit.sources.contents import WeightFile
from modekit.sources.header import FileState

_YOUNG_NS = 2 * 10**9
"""Within a tick of the clock another change would not show in a file's time."""
_NO_SETTINGS = frozenset(
    {"_name_or_path", "transformers_version", "peft_version", "base_model_name_or_path", "revision", "quantization_config"}
)
_KNOWN: dict[tuple[Path, FileState], str] = {}


def settings_digest(config: Config) -> str:
    """Changes with what a model's or adapter's config makes of its weights; who saved it, and where, does not count."""
    return digest_of_data({key: value for key, value in config.items() if key not in _NO_SETTINGS})


def blake3_of(path: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> str:
    """A file's hash, read now; `progress` is told the bytes so far and in all. Raises SourceError."""
    digest = blake3()
    done = 0
    with closing(WeightFile(path)) as file:
        for chunk in file.chunks(0, file.state.size):
            digest.update(chunk)
            done += len(chunk)
            progress(done, file.state.size)
        file.check_unchanged()
    return str(digest.hexdigest())


def known_blake3(path: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> str:
    """A file's hash; a process reads a file once while its size, time and inode are what they were. Raises SourceError."""
    with suppress(OSError):
        state = FileState.of(path)
        if state.modified_ns < time.time_ns() - _YOUNG_NS:
            if (path, state) not in _KNOWN:
                _KNOWN[path, state] = blake3_of(path, progress)
            return _KNOWN[path, state]
    return blake3_of(path, progress)
