"""What a stranger's task file says and the harness runs, within limits: its templates and its regular expressions.

The harness matches with `re`, which cannot be stopped. `BoundedPatterns` stands for that module in those of its modules that
match what a task file says. Templates run in jinja's sandbox.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from jinja2 import StrictUndefined
from jinja2.sandbox import SandboxedEnvironment

from modekit.errors import TextError
from modekit.sources.patterns import bounded

if TYPE_CHECKING:
    import regex

LONGEST = 2**20
"""Characters of a text that a template gives."""
_SECONDS = 60.0  # for all matches of a run; a pattern on ten thousand answers takes less than one
_Found = TypeVar("_Found")


def render(template: str, item: Mapping[str, object]) -> str:
    """As the harness's `apply_template`. Raises TextError when the template fails, or gives a huge text."""
    environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["regex_replace"] = lambda text, pattern, repl, count=0: re.sub(pattern, repl, text, count=count)
    try:
        text = environment.from_string(template).render(**item)
        if len(text) <= LONGEST:
            return text
        problem = f"it gives {len(text):,} characters"
    except Exception as error:  # a template raises what it likes
        problem = f"{type(error).__name__}: {error}"
    raise TextError(
        "a task's template cannot be used",
        where="TASKS",
        found=f"{problem[:300]} ({' '.join(template.split())[:200]})",
        remedy=f"correct the template, which may give at most {LONGEST:,} characters",
    )


@dataclass
class BoundedPatterns:
    """What the harness uses of `re`; `seconds` is what is left for all matches."""

    seconds: float = _SECONDS
    _known: dict[str, BoundedPattern] = field(default_factory=dict)

    escape = staticmethod(re.escape)

    def compile(self, pattern: str) -> BoundedPattern:
        """As `re.compile`. Raises ValueError for a pattern that cannot be bounded."""
        if pattern not in self._known:
            self._known[pattern] = BoundedPattern(bounded(pattern), self)
        return self._known[pattern]

    def findall(self, pattern: str, text: str) -> list[object]:
        """As `re.findall`."""
        return self.compile(pattern).findall(text)

    def sub(self, pattern: str, replacement: str, text: str) -> str:
        """As `re.sub`."""
        return self.compile(pattern).sub(replacement, text)


@dataclass(frozen=True)
class BoundedPattern:
    """A compiled pattern."""

    _compiled: regex.Pattern[str]
    _all: BoundedPatterns

    def findall(self, text: str) -> list[object]:
        """As `re.Pattern.findall`."""
        return self._in_time(lambda seconds: list(self._compiled.findall(text, timeout=seconds)))

    def sub(self, replacement: str, text: str) -> str:
        """As `re.Pattern.sub`."""
        return self._in_time(lambda seconds: str(self._compiled.sub(replacement, text, timeout=seconds)))

    def _in_time(self, match: Callable[[float], _Found]) -> _Found:
        """What `match` finds within the seconds that are left. Raises TextError when that is not enough."""
        begin = time.perf_counter()
        try:
            return match(max(self._all.seconds, 1e-6))
        except (TimeoutError, MemoryError):
            raise TextError(
                f"a task's regular expression takes too long (all matches may take {_SECONDS:.0f} seconds)",
                where="TASKS",
                found=self._compiled.pattern[:200],
                remedy="write one without repeats inside of repeats, or leave the filter out",
            ) from None
        finally:
            self._all.seconds -= time.perf_counter() - begin
