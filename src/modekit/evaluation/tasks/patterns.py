"""Regular expressions of task files: checked when the file is read, and stopped when they match for too long.

The harness matches with `re`, which cannot be stopped. `Patterns` stands for that module in those of its modules that match
what a task file says.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from modekit.errors import TextError
from modekit.sources.patterns import bounded

if TYPE_CHECKING:
    import regex

_SECONDS = 60.0  # for all matches of a run; a pattern on ten thousand answers takes less than one
_Found = TypeVar("_Found")


@dataclass
class Patterns:
    """What the harness uses of `re`; `seconds` is what is left for all matches."""

    seconds: float = _SECONDS
    _known: dict[str, Pattern] = field(default_factory=dict)

    @staticmethod
    def escape(text: str) -> str:
        """As `re.escape`."""
        return re.escape(text)

    def compile(self, pattern: str) -> Pattern:
        """As `re.compile`. Raises ValueError for a pattern that cannot be bounded."""
        if pattern not in self._known:
            self._known[pattern] = Pattern(bounded(pattern), self)
        return self._known[pattern]

    def findall(self, pattern: str, text: str) -> list[Any]:
        """As `re.findall`."""
        return self.compile(pattern).findall(text)

    def sub(self, pattern: str, replacement: str, text: str) -> str:
        """As `re.sub`."""
        return self.compile(pattern).sub(replacement, text)

    def run(self, pattern: str, match: Callable[[float], _Found]) -> _Found:
        """What `match` finds within the seconds that are left. Raises TextError when that is not enough."""
        begin = time.perf_counter()
        try:
            return match(max(self.seconds, 1e-6))
        except (TimeoutError, MemoryError):
            raise TextError(
                f"a task's regular expression takes too long (all matches may take {_SECONDS:.0f} seconds)",
                where="TASKS",
                found=pattern[:200],
                remedy="write one without repeats inside of repeats, or leave the filter out",
            ) from None
        finally:
            self.seconds -= time.perf_counter() - begin


@dataclass(frozen=True)
class Pattern:
    """A compiled pattern."""

    _compiled: regex.Pattern[str]
    _patterns: Patterns

    def findall(self, text: str) -> list[Any]:
        """As `re.Pattern.findall`."""
        found: list[Any] = self._patterns.run(
            self._compiled.pattern, lambda seconds: self._compiled.findall(text, timeout=seconds)
        )
        return found

    def sub(self, replacement: str, text: str) -> str:
        """As `re.Pattern.sub`."""
        found: str = self._patterns.run(
            self._compiled.pattern, lambda seconds: self._compiled.sub(replacement, text, timeout=seconds)
        )
        return found
