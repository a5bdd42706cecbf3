"""OUT.partial/journal: lines of JSON, each a key and what is surely written under it. The first has the digest and the boot.

After a power loss it is believed only as far as the disk had the bytes: of shards that were written whole.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import JsonValue

from modekit.files.read import read_text
from modekit.files.tensors import write_all
from modekit.files.write import go_on_writing, write_file

_LARGEST = 2**28


class Journal:
    """A journal that is written anew with what is known, and then line by line, by any thread. Raises OSError."""

    def __init__(self, path: Path, digest: str, known: Mapping[str, JsonValue] = {}) -> None:
        self._known, self._appending = dict(known), threading.Lock()
        lines = [_line(digest, _this_boot()), *(_line(key, value) for key, value in known.items())]
        write_file(path, b"".join(lines), sync=False)
        self._stream = go_on_writing(path, append=True)

    def recall(self, key: str) -> JsonValue:
        """What was recorded under a key; None when nothing."""
        return self._known.get(key)

    def record(self, key: str, value: JsonValue) -> None:
        """Append a line. Call only when what it claims is already written."""
        with self._appending:
            write_all(self._stream, memoryview(_line(key, value)))
            self._known[key] = value

    def close(self) -> None:
        """Release the file."""
        self._stream.close()


def read_journal(path: Path, digest: str) -> dict[str, JsonValue]:
    """What a run of the same digest that was cut short has recorded. Raises OSError or ValueError where there was none."""
    (known, boot), *rest = _whole_lines(read_text(path, _LARGEST))
    if known != digest:
        raise ValueError("it is of another command")
    done = dict(rest)
    if boot and boot == _this_boot():
        return done
    return {key: value for key, value in done.items() if not key.startswith("shard ") or done.get(f"synced {key[6:]}")}


def _this_boot() -> str:
    """Changes whenever the machine starts; empty where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _line(key: str, value: JsonValue) -> bytes:
    return (json.dumps([key, value]) + "\n").encode()


def _whole_lines(text: str) -> Iterator[tuple[str, JsonValue]]:
    """The entries, up to the one that a kill cut short."""
    for each in text.splitlines():
        try:
            key, value = json.loads(each)
        except (ValueError, TypeError, RecursionError):  # it is cut short
            return
        yield str(key), value
