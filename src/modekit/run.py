"""How a command runs, said once and handed down: whether code of others may run, and who is told of progress.

Progress is a callback that the command line draws; library code neither prints nor exits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Progress(Protocol):
    """Called with the name of the stage, how much of it is done, and how much there is (same unit)."""

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


QUIET = Run()
"""No code of others runs, and nobody is told."""
