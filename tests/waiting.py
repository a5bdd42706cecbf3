"""Waiting for other processes: until something holds, and never for a time that a busy machine does not keep."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE_S = 300.0  # far more than anything takes that works


def until(holds: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
    """Return once it holds; where the other side is not there to be asked (OSError), it does not yet."""
    end = time.monotonic() + patience_s
    while not _now(holds):
        assert time.monotonic() < end, "it never came to hold"
        time.sleep(0.1)


def _now(holds: Callable[[], bool]) -> bool:
    try:
        return holds()
    except OSError:
        return False
