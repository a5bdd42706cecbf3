"""How long a build takes here, told before it: from the plan's counts and a twentieth of a second of products. No torch.

The processor is measured as busy as it is now. The speed of the disk is assumed, and so is how much of the products' speed a
model's pass reaches (benchmarks/speed.md has what was predicted and what it took).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modekit.planning.plan import Plan
from modekit.planning.work import fit_work

_BYTES_PER_SECOND = 600e6
"""Copied, hashed and brought to the disk; a fast disk does twice as much, a slow one a third."""
_SHARE_OF_PRODUCTS = 0.6
"""What a pass of a model reaches of the speed of its products."""
_COPY_SECONDS, _FIT_SECONDS = 0.5, 10.0
"""Processor time of what does not grow with the work: a command that starts; libraries and models that are loaded, text that is
tokenised, a table that is trained.
"""
_FACTOR = 1.6
_MEASURED_SECONDS = 0.1
_ROWS, _WIDTH = 256, 1_024  # of the products that are measured
_ACCELERATOR = Path("/dev/nvidia0")

Clock = Callable[[], float]


@dataclass(frozen=True)
class NeededTime:
    """Seconds that a build needs on the processor: to write tensors and statistics, and to fit the router.

    `accelerated`: there is an accelerator, on which the fit takes less.
    """

    write: float
    fit: float
    accelerated: bool = False

    @property
    def range(self) -> tuple[float, float]:
        """The least and the most that it takes, as far as one can tell."""
        middle = self.write + self.fit
        return middle / _FACTOR, middle * _FACTOR

    def as_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "range": list(self.range)}


def needed_time(plan: Plan, *, clock: Clock = time.perf_counter, used: Clock = time.process_time) -> NeededTime:
    """The time that a build of a plan needs on this machine, which is measured for a moment."""
    statistics = plan.statistics_bytes(in_memory=False) if plan.recipe.mixture.keeps_statistics else 0
    write = (plan.bytes_written + statistics) / _BYTES_PER_SECOND
    machine, work = measured(clock, used), fit_work(plan)
    write = (write + _COPY_SECONDS) / machine.share
    if work is None:
        return NeededTime(write, 0.0)
    fit = (work.flops + work.solving) / (_SHARE_OF_PRODUCTS * machine.products) + _FIT_SECONDS / machine.share
    return NeededTime(write, fit, _ACCELERATOR.exists() and work.reads)


@dataclass(frozen=True)
class Machine:
    """As busy as it is now: floating-point operations per second of float32 matrix products, and the share of a processor
    that a command gets.
    """

    products: float
    share: float


def measured(clock: Clock = time.perf_counter, used: Clock = time.process_time) -> Machine:
    """Measure for a moment; `used` says the seconds that the processors worked for this process."""
    left, right = np.ones((_ROWS, _WIDTH), np.float32), np.ones((_WIDTH, _WIDTH), np.float32)
    left @ right  # the first one warms up
    started, worked, calls = clock(), used(), 0
    while True:
        left @ right
        calls += 1
        passed = clock() - started
        if passed >= _MEASURED_SECONDS:
            share = min(1.0, max(0.02, (used() - worked) / passed))
            return Machine(2.0 * _ROWS * _WIDTH * _WIDTH * calls / passed, share)
