"""Regular expressions that a stranger wrote, matched against names of modules within a limit of time and memory.

PEFT matches with `re`, which cannot be stopped, and some patterns take longer than any life. The package `regex` means the same
by all patterns that are accepted here (tests/sources/test_patterns.py compares them) and stops when it is told to.
"""

from __future__ import annotations

import re
import time
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from modekit.errors import SourceError

if TYPE_CHECKING:
    import regex

_SECONDS = 10.0  # for all matches of one adapter; a thousand modules and a hundred patterns take a quarter of one
_LARGEST = 20_000  # parts of a pattern with its counted repeats written out
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{[0-9]*(?:,[0-9]*)?\}|.", re.DOTALL)
_COMMENTS = re.compile(r"\(\?(?:#|[a-zA-Z-]*x)")
_LITERAL = re.compile(r"[A-Za-z0-9_.]*")
_REMEDY = "name the modules in full in place of a pattern, or download or save the adapter again"


@dataclass
class ModulePatterns:
    """The patterns of one adapter; `where` is its config in messages, `seconds` what is left for matching them."""

    where: str = "adapter_config.json"
    seconds: float = _SECONDS
    _known: dict[str, regex.Pattern[str]] = field(default_factory=dict)

    def fullmatch(self, pattern: str, name: str) -> bool:
        """Whether a pattern is all of a name, as `re.fullmatch` says. Raises SourceError for what is no pattern, or hangs."""
        return self._run(pattern, name, whole=True) is not None

    def match(self, pattern: str, name: str) -> regex.Match[str] | None:
        """What `re.match` finds. Raises SourceError for what is no pattern, or hangs."""
        return self._run(pattern, name, whole=False)

    def ends(self, pattern: str, name: str) -> bool:
        """Whether a pattern is all of a name, or of its end after a dot (PEFT's `get_pattern_key`). Raises as `match`."""
        plain = _LITERAL.fullmatch(pattern) is not None  # most are names, and most names are others
        if plain and "\n" not in name and not name.endswith(pattern.rpartition(".")[2]):
            return False
        return self.match(rf"(.*\.)?({pattern})$", name) is not None

    def _run(self, pattern: str, name: str, *, whole: bool) -> regex.Match[str] | None:
        begin = time.perf_counter()
        compiled = self._known.get(pattern) or self._read(pattern)
        try:
            return (compiled.fullmatch if whole else compiled.match)(name, timeout=max(self.seconds, 1e-6))
        except (TimeoutError, MemoryError):
            raise SourceError(
                f"a pattern takes too long to match (more than {_SECONDS:.0f} seconds)",
                where=self.where,
                found=pattern[:200],
                remedy=_REMEDY,
            ) from None
        finally:
            self.seconds -= time.perf_counter() - begin

    def _read(self, pattern: str) -> regex.Pattern[str]:
        try:
            self._known[pattern] = bounded(pattern)
        except ValueError as error:
            raise SourceError(
                "a pattern in adapter_config.json is no regular expression, or none that can be used",
                where=self.where,
                found=f"{pattern[:200]}: {error}",
                remedy=_REMEDY,
            ) from None
        return self._known[pattern]


def bounded(pattern: str) -> regex.Pattern[str]:
    """A pattern that stops when it is told to, and means what it means to `re`. Raises ValueError for any other."""
    import regex  # here, as few adapters have patterns

    try:
        with warnings.catch_warnings():  # of what other versions of Python may make of it
            warnings.simplefilter("ignore")
            re.compile(pattern)
            _check_size(pattern)
            return regex.compile(pattern, regex.VERSION0, cache_pattern=False)
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from None


def _check_size(pattern: str) -> None:
    """Raise ValueError for a pattern, a valid one, that `regex` would take for something else, or make too large."""
    if _COMMENTS.search(pattern):
        raise ValueError("it has comments")
    totals, last = [0], 0
    for token in _TOKEN.findall(pattern):
        if token == "(":
            totals.append(0)
        elif token == ")":
            last = totals.pop()
            totals[-1] += last
        elif token in {"{", "{}", "{,}"} or (token[0] == "[" and "[:" in token):
            raise ValueError(f"{token[:40]} means something else to other tools")
        elif token[0] == "{":
            count = max((int(digits) for digits in re.findall("[0-9]+", token)), default=1)
            totals[-1] += last * max(count - 1, 0)
            last *= max(count, 1)
        else:
            last = 1
            totals[-1] += 1
        if totals[-1] > _LARGEST:
            raise ValueError("it is too large")
