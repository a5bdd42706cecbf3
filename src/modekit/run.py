"""How a command runs, said once and handed down: whether code of others may run, and who is told of progress.

Progress is a callback that the command line draws; library code neither prints nor exits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

_Item = TypeVar("_Item")

DETAIL = " · "
"""Between the name of a phase and what is said of it for the moment, as a loss: `train · loss 2.310`."""


class Progress(Protocol):
    """Called with the name of a phase, how much of it is done, and how much there is (same unit).

    The total is 1 where nobody can count the work. A phase ends when all of it is done, or, where it is not counted, when
    another phase begins.
    """

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Report."""


def silent(stage: str, done: int, total: int) -> None:
    """Draw nothing."""


@dataclass(frozen=True)
class Run:
    """What every step of a command needs to know and none of them decides.

    Attributes:
        trust_remote_code: whether Python that a model brings may run; False unless the user said so.
        progress: who is told how far a stage is.
        sync: whether a command waits until the disk has what it wrote, so that a power loss costs nothing.
    """

    trust_remote_code: bool = False
    progress: Progress = silent
    sync: bool = True

    def about(self, name: str) -> Run:
        """The same, whose phases are told as those of something that has a name."""
        return replace(self, progress=lambda stage, done, total: self.progress(f"{name}: {stage}", done, total))

    def over(self, phase: str, items: Iterable[_Item], count: int) -> Iterator[_Item]:
        """Each of so many items; what came before it is reported as done, and all of them at the end."""
        for done, item in enumerate(items):
            self.progress(phase, done, max(1, count))
            yield item
        self.progress(phase, max(1, count), max(1, count))

    def begin(self, phase: str, total: int = 1) -> None:
        """Name a phase before its first work is done; without a total its work is not counted."""
        self.progress(phase, 0, max(1, total))


@dataclass
class ProgressCount:
    """Work that is counted over several phases."""

    run: Run
    total: int
    done: int = 0

    def advance(self, phase: str, count: int = 0) -> None:
        """So much more is done, in a phase."""
        self.done += count
        self.run.progress(phase, self.done, self.total)


QUIET = Run()
"""No code of others runs, and nobody is told."""
