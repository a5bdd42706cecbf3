"""Errors that a user can mend: exit code 2 at the command line. Each says what failed, where, what was found, what to do."""

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
        parts = {"where": self.where, "found": self.found, "expected": self.expected, "to do": self.remedy}
        lines = [f"  {label + ':':<10}{_shown(value)}" for label, value in parts.items() if value is not None]
        return "\n".join([_shown(self.what), *lines])


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
    """The recipe is wrong: an unknown key, a wrong value, a setting without effect; all problems, each with its place."""


class SourceError(ModekitError):
    """A model cannot be read, or must not be: missing, truncated, pickle, remote code, NaN."""


class MismatchError(ModekitError):
    """An expert does not fit the base model: shape, family, rope, tokenizer."""


class UnsupportedError(ModekitError):
    """No native architecture says this mixture exactly."""


class TextError(ModekitError):
    """Text cannot be used: empty, binary, a domain without held-out documents."""


class TrainingError(ModekitError):
    """A training cannot start, or had to stop: settings, memory, a loss that is not finite."""


class EngineError(ModekitError):
    """Another engine cannot be started, or says something else than transformers."""


class OutputError(ModekitError):
    """The result folder cannot be written: it exists, the disk is full."""


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
    missing = []
    for name in names:
        try:
            missing += [name] if find_spec(name) is None else []
        except ImportError:
            missing.append(name)
    return missing


def check_packages(names: Sequence[str], remedy: str) -> None:
    """Raise ModekitError where a package is not installed; `remedy`: how to install it."""
    if missing := missing_packages(names):
        raise ModekitError("a package is not installed", where=", ".join(missing), remedy=remedy)
