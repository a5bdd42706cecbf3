"""Small files that strangers made, as models: what a file must hold is said once, as a type, and checked as it is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, Field, StringConstraints, TypeAdapter, ValidationError
from pydantic.functional_serializers import PlainSerializer

from modekit.files.read import read_json

_Kind = TypeVar("_Kind")
_LONGEST = 300  # characters of a problem that are said: a message does not grow with what is wrong
_MOST = 1_000  # problems among which the first is looked for

Count = Annotated[int, Field(ge=0, le=2**63, strict=True)]
"""How many there are: whole, and no more than can be."""
Number = Annotated[float, Field(allow_inf_nan=False, ge=-1e300, le=1e300, strict=True)]
"""A measured figure: finite, and so is a sum of many."""
SIX_DIGITS = PlainSerializer(lambda value: float(f"{value:.6g}"), return_type=float)
Figure = Annotated[Number, SIX_DIGITS]
"""A figure that a file has with 6 significant digits."""
Digest = Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{64})?$")]
"""64 hexadecimal digits, or nothing."""


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must be a line of characters that can be printed")
    return text


Label = Annotated[str, StringConstraints(max_length=300), AfterValidator(_printable)]
"""What a table calls something."""
PlainName = Annotated[str, StringConstraints(pattern=r"^[^/\\\x00:]*[^/\\\x00:.][^/\\\x00:]*$")]
"""A name without a path."""
RelativePath = Annotated[str, StringConstraints(max_length=4_096, pattern=r"^([^/\\\x00]([^:\x00][^\x00]*)?)?$")]
"""A path relative to the folder that the file lies in."""
Spec = Annotated[str, StringConstraints(max_length=4_096, pattern=r"^[^\x00]*$")]
"""A path or hub id, as somebody wrote it."""

adapter_of = cache(TypeAdapter)  # made once, as pydantic takes milliseconds for each


def read_as(path: Path, kind: type[_Kind]) -> _Kind:
    """A regular file's JSON as a type that pydantic checks. Raises OSError, and ValueError with the first thing wrong."""
    return as_kind(read_json(path), kind)


def as_kind(data: object, kind: type[_Kind]) -> _Kind:
    """Plain data as a type that pydantic checks. Raises ValueError with the first thing wrong."""
    try:
        return adapter_of(kind).validate_python(data)  # type: ignore[arg-type,no-any-return]  # a class is hashable
    except ValidationError as error:
        raise ValueError(problem_in(error)) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def problem_in(error: ValidationError) -> str:
    """The first thing that is wrong, and where, in a line."""
    if error.error_count() > _MOST:
        return f"{error.error_count():,} problems"
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    said = problem_said(first["msg"])
    return shortened(f"{where}: {said}" if where else said)


def problem_said(message: str) -> str:
    """What pydantic says of a value, in the words of this module."""
    return message.removeprefix("Value error, ").replace("Input should be", "must be")


def shortened(text: object) -> str:
    """The first line of what somebody else says, no longer than a line."""
    line = next(iter(str(text).splitlines()), "")
    return line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"


def said_by(error: BaseException) -> str:
    """The first line of another library's error, or its kind where it says nothing."""
    return shortened(error) or type(error).__name__


def entries(data: object) -> Iterator[tuple[str, object]]:
    """Every key and its value in mappings, and in mappings and lists within these."""
    waiting = [data]
    while waiting:
        each = waiting.pop()
        if isinstance(each, Mapping):
            yield from each.items()
        waiting += each.values() if isinstance(each, Mapping) else each if isinstance(each, list) else ()
