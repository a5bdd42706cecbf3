"""How the command line shows progress: a bar on a terminal, lines elsewhere. Both on the standard error.

A line when a phase begins, then one every ten seconds, and every half minute once a command has run for ten minutes. A command
that is silent for two seconds says that it is at work.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from modekit.cli.printing import err
from modekit.cli.shell import common
from modekit.files.figures import clock_of
from modekit.run import DETAIL, Progress, Run

LIBRARIES = "load the libraries"
"""First phase of any command: on a busy machine that alone takes long."""
_FIRST, _SOON, _EVERY = 2.0, 10.0, 30.0  # seconds of silence: at first, later, after ten minutes
_EVIDENCE = 3.0  # seconds of work before a time is said
_LONGEST = 48  # characters of a phase, so that lines have 80 columns


class Lines:
    """Progress as lines. `write` gets each line, `clock` says seconds that never go back.

    `tick` may be called from another thread, so that a phase that reports nothing for long (a model that is read) is still seen
    to go on.
    """

    def __init__(self, write: Callable[[str], object], clock: Callable[[], float] = time.monotonic) -> None:
        self._write, self._clock, self._lock = write, clock, threading.Lock()
        self._began = self._last = self._since = self._advanced = clock()
        self._phase, self._detail, self._said = LIBRARIES, "", set[str]()
        self._first, self._done, self._total = 0, 0, 1

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Take a report; write a line where the phase is new, or nothing was said for long."""
        with self._lock:
            self._phase, _, self._detail = stage.partition(DETAIL)
            if total != self._total or done < self._done:  # other work: its speed is its own
                self._since, self._first = self._clock(), done
            if total != self._total or done != self._done:
                self._advanced = self._clock()
            self._done, self._total = done, total
            if done < total and (self._phase not in self._said or self._is_due()):
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
        self._last = now = self._clock()
        self._said.add(self._phase)
        phase = self._phase if len(self._phase) <= _LONGEST else f"{self._phase[: _LONGEST - 1]}…"
        parts = [f"{100 * self._done // self._total} %"] if self._total > 1 else []
        if self._first < self._done and self._advanced - self._since >= _EVIDENCE:
            left = (self._advanced - self._since) * (self._total - self._done) / (self._done - self._first)
            left -= now - self._advanced  # which has gone by since
            parts += [f"{clock_of(left)} left"] if left > 0 else []
        parts += [self._detail] if self._detail else []
        said = f"{phase}{': ' if parts else ''}{', '.join(parts)}"
        if self._done >= self._total:
            said = f"after {phase}: still at work"
        self._write(f"{clock_of(now - self._began)}  {said}")


@contextmanager
def drawn_progress() -> Iterator[Progress]:
    """A bar with the time left on a terminal, lines elsewhere."""
    with _bar() if err.is_terminal else _lines() as draw:
        yield draw


@contextmanager
def running() -> Iterator[Run]:
    """For the room that does the work of a command; its progress is drawn while this is open."""
    with drawn_progress() as progress:
        yield Run(common().trust_remote_code, progress, common().fsync)


@contextmanager
def _bar() -> Iterator[Progress]:
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars
    from rich.table import Column

    whole = Column(no_wrap=True)
    columns = (
        TextColumn("{task.description}", markup=False, table_column=whole),
        BarColumn(None, table_column=Column(max_width=16)),  # gives way to long names
        TaskProgressColumn(table_column=whole),
        TimeRemainingColumn(elapsed_when_finished=True, table_column=whole),
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
