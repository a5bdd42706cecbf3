"""How many threads an engine computes with on processors, and how they wait for each other.

llama.cpp's threads meet after every operation. Where one of them has no core to itself, the others wait for it and by default
spin, which costs up to a hundred times the time (benchmarks/llama.md).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

ASKED = "OMP_NUM_THREADS"
_WAITING = "OMP_WAIT_POLICY"
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def default_threads() -> int:
    """OMP_NUM_THREADS where it is set; else the cores that this process may use, by its affinity and its container's quota."""
    asked = os.environ.get(ASKED, "").split(",")[0].strip()
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # "max 100000" where there is no quota
        quota, period = map(int, _QUOTA.read_text().split())
        cores = min(cores, math.ceil(quota / period))
    return max(1, cores)


def threads_environment(threads: int) -> Mapping[str, str]:
    """What a process finds in its environment so that it computes with so many threads, which sleep while they wait."""
    return {ASKED: str(threads), _WAITING: os.environ.get(_WAITING, "passive")}
