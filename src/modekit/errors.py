"""The error tree. Every message says what failed, where, what was found, what was expected and what to do.

ModekitError            exit code 2 at the command line
├── RecipeError         the recipe itself: unknown key, wrong value, a setting without effect
├── SourceError         a model that cannot be read: missing, truncated, pickle, remote code, NaN
├── MismatchError       an expert that does not fit the base model: shape, family, rope, tokenizer
├── UnsupportedError    a mixture that no native architecture can say exactly
├── TextError           text that cannot be used: empty, binary, a domain without held-out documents
├── TrainingError       a training that cannot start or go on: settings, memory, a loss that is not finite
├── EngineError         another engine that cannot be started, or that says something else than transformers
├── OutputError         the result folder: exists, disk full, not writable
├── CheckpointError     a folder that is not (or no longer) a whole modekit checkpoint
└── InterruptError      the user pressed Ctrl-C
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec

_LONGEST = 4_000  # characters of each part of a message: names and values that strangers wrote are of any length
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a terminal obeys them; line ends and tabs are harmless


class ModekitError(Exception):
    """Base of all errors that a user can cause and mend.

    `what` is one sentence. The keyword parts are printed on lines of their own, each only when given.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        found: object = None,
        expected: object = None,
        remedy: str | None = None,
    ) -> None:
        self.what = what
        self.where = where
        self.found = found
        self.expected = expected
        self.remedy = remedy
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [_shown(self.what)]
        for label, value in (
            ("where", self.where),
            ("found", self.found),
            ("expected", self.expected),
            ("to do", self.remedy),
        ):
            if value is not None:
                lines.append(f"  {label + ':':<10}{_shown(value)}")
        return "\n".join(lines)


def _shown(value: object) -> str:
    """A value as text that any terminal and file can take: cut when long, without control characters and half characters."""
    try:
        text = str(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, a list within itself
        return f"something of the kind {type(value).__name__} that cannot be written"
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}... and {len(text) - _LONGEST:,} characters more"
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text).encode("utf-8", "backslashreplace").decode()


class RecipeError(ModekitError):
    """The recipe is wrong; all problems are reported together with their place."""


class SourceError(ModekitError):
    """A base model or expert cannot be read or must not be used."""


class MismatchError(ModekitError):
    """An expert cannot be mixed with this base model."""


class UnsupportedError(ModekitError):
    """No native architecture says this mixture exactly."""


class TextError(ModekitError):
    """Text of a domain cannot be used."""


class TrainingError(ModekitError):
    """A training cannot start, or had to stop."""


class EngineError(ModekitError):
    """Another engine cannot be started, or says something else than transformers."""


class OutputError(ModekitError):
    """The result folder cannot be written."""


class CheckpointError(ModekitError):
    """The folder is not a whole modekit checkpoint, or no longer what modekit.json says."""


class InterruptError(ModekitError):
    """The user interrupted the command."""


def some_of(names: Sequence[object], most: int = 3) -> str:
    """Names for a message: the first of them, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def missing_packages(names: Sequence[str]) -> list[str]:
    """Those that are not installed, or do not import what they stand in."""
    return [name for name in names if not _is_there(name)]


def _is_there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ImportError:
        return False


def check_packages(names: Sequence[str], remedy: str) -> None:
    """Raise ModekitError where a package is not installed; `remedy`: how to install it."""
    missing = missing_packages(names)
    if missing:
        raise ModekitError("a package is not installed", where=", ".join(missing), remedy=remedy)
