"""Progress is a callback that the command line draws; library code neither prints nor exits."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called with the name of the stage, how much of it is done, and how much there is (same unit)."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Report."""


def silent(stage: str, done: int, total: int) -> None:
    """Draw nothing."""
