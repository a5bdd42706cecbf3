"""OUT.partial/journal: lines of JSON, each a key and what is surely written under it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def this_boot() -> str:
    """Changes whenever the machine starts; empty where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def on_disk(done: dict[str, Any]) -> dict[str, Any]:
    """What can be believed of a journal from before the machine was started: shards that the disk had."""
    return {key: value for key, value in done.items() if not key.startswith("shard ") or done.get(f"synced {key[6:]}")}


def line(key: str, value: object) -> bytes:
    """One entry."""
    return (json.dumps([key, value]) + "\n").encode()


def whole_lines(text: str) -> Iterator[tuple[str, Any]]:
    """The entries of a journal, up to the one that a kill cut short."""
    for each in text.splitlines():
        try:
            key, value = json.loads(each)
        except (ValueError, TypeError, RecursionError):  # it is cut short
            return
        yield str(key), value
