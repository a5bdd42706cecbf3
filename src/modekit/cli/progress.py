"""How the command line shows progress: a bar on a terminal, lines elsewhere. Both on the standard error.

A line when a phase begins, one as soon as it is known how long it will take, then one every ten seconds, and every half
minute once a command has run for ten minutes. A command that is silent for two seconds says that it is at work.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from modekit.cli.printing.console import err
from modekit.cli.shell import common
from modekit.files.figures import clock_of, time_of
from modekit.run import DETAIL, Progress, Run

LIBRARIES = "load the libraries"
"""First phase of any command: on a busy machine that alone takes long."""
_FIRST, _SOON, _EVERY = 2.0, 10.0, 30.0  # seconds of silence: at first, later, after ten minutes
_EVIDENCE = 3.0  # seconds of work before a time is said
_WIDTH = 80
_SHARED = ("score ", "read ")  # phases of that name count what all of them do: one estimate


@dataclass
class _Work:
    """What is counted together: when it began and with how much done, and whether a line has said its time."""

    since: float
    first: int
    done: int
    total: int
    says_time: bool = False

    def left(self, now: float) -> float | None:
        """Seconds left; None while there is no evidence, or nothing left."""
        if not self.first < self.done < self.total or now - self.since < _EVIDENCE:
            return None
        return (now - self.since) * (self.total - self.done) / (self.done - self.first)


class Lines:
    """Progress as lines of at most 80 columns. `write` gets each line, `clock` says seconds that never go back.

    Several phases may go on at once; each is said when it begins. `tick` may be called from another thread, so that a phase
    that reports nothing for long (a model that is read) is still seen to go on.
    """

    def __init__(self, write: Callable[[str], object], clock: Callable[[], float] = time.monotonic) -> None:
        self._write, self._clock, self._lock = write, clock, threading.Lock()
        self._began = self._last = clock()
        self._works: dict[str, _Work] = {}
        self._said: set[str] = set()
        self._phase, self._detail, self._work = LIBRARIES, "", _Work(self._began, 0, 0, 1)

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Take a report; write a line where the phase is new, or the time that it takes."""
        with self._lock:
            now = self._clock()
            self._phase, _, self._detail = stage.partition(DETAIL)
            about, colon, rest = self._phase.rpartition(": ")
            name = next((about + colon + start for start in _SHARED if rest.startswith(start)), self._phase)
            work = self._works.get(name)
            if work is None or total != work.total or done < work.done:
                work = self._works[name] = _Work(now, done, done, total)
            work.done, self._work = done, work
            is_new, left = self._phase not in self._said, None if work.says_time else work.left(now)
            self._said.add(self._phase)
            if done < total and (is_new or (left is not None and left >= _EVERY) or self._is_due()):
                self._say()

    def tick(self) -> None:
        """Say how far it is when nothing was said for long."""
        with self._lock:
            if self._is_due():
                self._say()

    def _is_due(self) -> bool:
        now = self._clock()
        silence = min(_EVERY, max(_SOON, (now - self._began) / 20)) if self._said else _FIRST
        return now - self._last >= silence

    def _say(self) -> None:
        work, self._last = self._work, self._clock()
        left = work.left(self._last)
        work.says_time |= left is not None
        parts = [f"{100 * work.done // work.total} %"] if work.total > 1 else []
        parts += [f"{time_of(left)} left"] if left is not None else []
        parts += [self._detail] if self._detail else []
        said = f"{self._phase}{': ' if parts else ''}{', '.join(parts)}"
        if work.done >= work.total:
            said = f"after {self._phase}: still at work"
        self._said.add(self._phase)
        line = f"{clock_of(self._last - self._began)}  {said}"
        too_long = len(line) - _WIDTH
        if too_long > 0:
            line = line.replace(self._phase, f"{self._phase[: max(8, len(self._phase) - too_long - 1)]}…", 1)
        self._write(line)


@contextmanager
def drawn_progress() -> Iterator[Progress]:
    """A bar with the time left on a terminal, lines elsewhere; nothing from processes that are not the main one."""
    from modekit.processes import processes

    if not processes().is_main:
        yield lambda _stage, _done, _total: None
        return
    with _bar() if err.is_terminal else _lines() as draw:
        yield draw


@contextmanager
def running() -> Iterator[Run]:
    """For the room that does the work of a command; its progress is drawn while this is open."""
    with drawn_progress() as progress:
        yield common().run(progress)


@contextmanager
def _bar() -> Iterator[Progress]:
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars
    from rich.table import Column

    columns = (
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
        BarColumn(None, table_column=Column(max_width=16)),  # gives way to long names
        TaskProgressColumn(table_column=Column(no_wrap=True)),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
    )
    with Bars(*columns, console=err, transient=True) as bars:
        task = bars.add_task(LIBRARIES, total=None)
        known = (0, 0)

        def draw(stage: str, done: int, total: int) -> None:
            nonlocal known
            if total != known[1] or done < known[0]:  # other work: its speed is its own
                bars.reset(task, completed=done)
            known = done, total
            said = ", ".join(stage.split(DETAIL))
            bars.update(task, description=said, completed=done, total=total if total > 1 else None)

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
