"""How the command line shows progress: bars on a terminal, lines elsewhere. Both on the standard error.

A line when a phase begins, one as soon as it is known how long the phase will take, and one every ten seconds, later every
half minute. While nothing advances, the time left grows no faster than the clock.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from modekit.cli.printing.console import err
from modekit.files.figures import clock_of, time_of
from modekit.run import DETAIL, Progress

if TYPE_CHECKING:
    from rich.progress import TaskID

LIBRARIES = "load the libraries"
"""First phase of commands that run models: on a busy machine that alone takes long."""
SOON, EVERY = 10.0, 30.0
"""Seconds after which a line says again how far the command is: at first, and once it has run for ten minutes."""
_RECENT = 60.0
"""Seconds of work that the time left is estimated from."""
_EVIDENCE = 3.0
"""Seconds that a phase must have advanced for before a time is said."""
_WIDTH = 80
_SHARED = ("score ", "read ")  # phases of that name count what all of them do: one bar, one estimate

Clock = Callable[[], float]


@dataclass
class Work:
    """One kind of work: phases that count together. `points` are seconds and what was done then, of the recent past."""

    total: int
    done: int
    points: deque[tuple[float, int]]
    said: set[str] = field(default_factory=set)  # phases of it that a line was written for
    says_time: bool = False  # a line with the time left was written

    @property
    def is_counted(self) -> bool:
        """Whether anybody says how far it is."""
        return self.total > 1

    @property
    def is_done(self) -> bool:
        """Whether all of it is done."""
        return 0 < self.total <= self.done

    def advance(self, now: float, done: int) -> None:
        """Take a report."""
        self.done = done
        if done > self.points[-1][1]:
            self.points.append((now, done))
            while len(self.points) > 2 and self.points[1][0] <= now - _RECENT:
                self.points.popleft()

    def left(self, now: float) -> float | None:
        """Seconds left at the recent speed, up to now; None while there is no evidence, or nothing left."""
        since, before = self.points[0]
        if self.is_done or self.done <= before or now - since < _EVIDENCE:
            return None
        return (now - since) * (self.total - self.done) / (self.done - before)


class Works:
    """The works of a command, by their names, and the phase that was heard of last."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._by_name: dict[str, Work] = {}
        self.phase, self.detail, self.work = "start", "", Work(0, 0, deque([(clock(), 0)]))

    def report(self, stage: str, done: int, total: int) -> str:
        """Take a report; the name of its work."""
        self.phase, _, self.detail = stage.partition(DETAIL)
        about, sign, rest = self.phase.rpartition(": ")
        name = next((about + sign + start for start in _SHARED if rest.startswith(start)), self.phase)
        now = self._clock()
        work = self._by_name.get(name)
        if work is None or total != work.total or done < work.done:
            work = self._by_name[name] = Work(total, done, deque([(now, done)]))
        work.advance(now, done)
        self.work = work
        return name

    @property
    def uncounted(self) -> list[str]:
        """Works of which nobody says how far they are: they end when another phase begins."""
        return [name for name, work in self._by_name.items() if not work.is_counted]

    def left(self, name: str) -> float | None:
        """Seconds left of a work."""
        return self._by_name[name].left(self._clock())

    def said(self) -> str:
        """What is going on, without the time."""
        if self.work.is_done:
            return f"after {self.phase}: still at work"
        left = self.work.left(self._clock())
        parts = [f"{100 * self.work.done // self.work.total} %"] if self.work.is_counted else []
        parts += [f"{time_of(left)} left"] if left is not None else []
        parts += [self.detail] if self.detail else []
        return f"{self.phase}{': ' if parts else ''}{', '.join(parts)}"


class Lines:
    """Progress as lines of at most 80 columns. `write` gets each line, `clock` says seconds that never go back.

    Several phases may go on at once; each is said when it begins. `tick` may be called from another thread, so that a phase
    that reports nothing for long (a model that is read) is still seen to go on.
    """

    def __init__(self, write: Callable[[str], object], clock: Clock = time.monotonic) -> None:
        self._write, self._clock = write, clock
        self._started = self._last = clock()
        self._works = Works(clock)
        self._lock = threading.Lock()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Take a report; write a line where the phase is new, or the time that it takes."""
        with self._lock:
            self._works.report(stage, done, total)
            work, phase = self._works.work, self._works.phase
            if work.is_done:
                work.said.add(phase)  # what is over when it is first heard of needs no line
                return
            left = None if work.says_time else work.left(self._clock())
            if phase not in work.said or (left is not None and left >= EVERY) or self._is_due():
                work.said.add(phase)
                self._say()

    def tick(self) -> None:
        """Say how far it is when nothing was said for long."""
        with self._lock:
            if self._is_due():
                self._say()

    def _is_due(self) -> bool:
        now = self._clock()
        return now - self._last >= min(EVERY, max(SOON, (now - self._started) / 20))

    def _say(self) -> None:
        self._last = self._clock()
        self._works.work.says_time |= self._works.work.left(self._last) is not None
        line = f"{clock_of(self._last - self._started)}  {self._works.said()}"
        too_long = len(line) - _WIDTH
        if too_long > 0:
            phase = self._works.phase
            line = line.replace(phase, f"{phase[: max(8, len(phase) - too_long - 1)]}…", 1)
        self._write(line)


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
    from rich.progress import BarColumn, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars
    from rich.table import Column
    from rich.text import Text

    works = Works(time.monotonic)

    class TimeLeft(ProgressColumn):
        """How much time is left, said anew whenever it is drawn."""

        def render(self, task: Task) -> Text:
            left = works.left(task.fields["work"])
            return Text("" if left is None else f"{time_of(left)} left", style="progress.remaining")

    columns = (
        TextColumn("{task.description:<22}", markup=False, table_column=Column(no_wrap=True)),
        BarColumn(None, table_column=Column(max_width=16)),  # gives way to long names
        TaskProgressColumn(table_column=Column(no_wrap=True)),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        TimeLeft(Column(no_wrap=True)),
    )
    with Bars(*columns, console=err, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def draw(stage: str, done: int, total: int) -> None:
            name = works.report(stage, done, total)
            for over in [each for each in works.uncounted if each != name and each in tasks]:
                bars.remove_task(tasks.pop(over))
            if name not in tasks:
                tasks[name] = bars.add_task(stage, total=None, work=name)
            described = works.phase + (f", {works.detail}" if works.detail else "")
            bars.update(tasks[name], description=described, completed=done, total=total if works.work.is_counted else None)

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
