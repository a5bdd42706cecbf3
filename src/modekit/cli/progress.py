"""How the command line shows progress: bars on a terminal, lines elsewhere. Both on the standard error.

A line when a stage begins and one every half minute, with the time so far and the time left:

    0:12  score medicine: 11 %, 1:31 left
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from modekit.cli.printing.console import err
from modekit.cli.printing.figures import clock_of
from modekit.run import Progress

EVERY = 30.0
"""Seconds after which a stage says again how far it is."""
_SHARED = ("score ", "read ")  # stages of that name count what all of them do: one bar, one estimate


@dataclass
class _Work:
    """One kind of work: stages that count together. `first` is when it was first heard of, and how much was done then."""

    first: tuple[float, int]
    done: int = 0
    total: int = 0
    begun: set[str] = field(default_factory=set)  # stages of it that were said

    def left(self, now: float) -> float | None:
        """Seconds left at the speed so far; None when there is none to tell it by."""
        seconds, done = now - self.first[0], self.done - self.first[1]
        return seconds * (self.total - self.done) / done if seconds > 0 and done > 0 else None


class Lines:
    """Progress as lines. `write` gets each line, `clock` says seconds that never go back.

    Several stages may go on at once; each is said when it begins. `tick` may be called from another thread, so that a stage
    that reports nothing for long (a model that is read) is still seen to go on.
    """

    def __init__(self, write: Callable[[str], object], clock: Callable[[], float] = time.monotonic) -> None:
        self._write, self._clock = write, clock
        self._started = self._said = clock()
        self._stage = ""
        self._works: dict[str, _Work] = {}
        self._lock = threading.Lock()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Take a report, and say it when the stage is new."""
        with self._lock:
            work = self._works.get(_group(stage))
            if work is None or total != work.total or done < work.done:
                work = self._works[_group(stage)] = _Work((self._clock(), done))
            work.done, work.total, self._stage = done, total, stage
            if stage not in work.begun or self._is_due():
                work.begun.add(stage)
                self._say()

    def tick(self) -> None:
        """Say how far it is when nothing was said for long."""
        with self._lock:
            if self._is_due():
                self._say()

    def _is_due(self) -> bool:
        return self._clock() - self._said >= EVERY

    def _say(self) -> None:
        self._said = self._clock()
        work = self._works.get(_group(self._stage))
        parts = [f"{100 * work.done / work.total:.0f} %"] if work is not None and work.total else []
        left = work.left(self._said) if work is not None else None
        parts += [f"{clock_of(left)} left"] if left is not None else []
        far = f": {', '.join(parts)}" if parts else ""
        self._write(f"{clock_of(self._said - self._started)}  {self._stage or 'starting'}{far}")


def _group(stage: str) -> str:
    about, sign, work = stage.rpartition(": ")
    return next((about + sign + start for start in _SHARED if work.startswith(start)), stage)


@contextmanager
def drawn_progress() -> Iterator[Progress]:
    """Bars with the time left on a terminal, lines elsewhere; nothing from processes that are not the main one."""
    from modekit.processes import processes

    if not processes().is_main:
        yield lambda _stage, _done, _total: None
    elif err.is_terminal:
        with _bars() as draw:
            yield draw
    else:
        with _lines() as draw:
            yield draw


@contextmanager
def _bars() -> Iterator[Progress]:
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description:<24}", markup=False), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Bars(*columns, console=err, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def draw(stage: str, done: int, total: int) -> None:
            group = _group(stage)
            if group not in tasks:
                tasks[group] = bars.add_task(stage, total=total)
            bars.update(tasks[group], description=stage, completed=done, total=total)

        yield draw


@contextmanager
def _lines() -> Iterator[Progress]:
    lines = Lines(lambda line: err.print(line, markup=False, highlight=False, soft_wrap=True))
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(1.0):
            lines.tick()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lines
    finally:
        ended.set()
        thread.join()
