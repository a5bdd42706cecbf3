"""What every part of a recipe shares: strictness, names, and how several problems become one error."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, StringConstraints

BASE = "base"
"""The word that stands for the base model wherever a model is named."""
SELF = "self"
"""The word that stands for text that an expert writes itself, in place of a path."""
WRITTEN_FOLDER = "self-text"
"""Beside a recipe: what its experts wrote themselves."""

_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
LONGEST_NAME = 64
Name = Annotated[str, StringConstraints(pattern=_NAME, max_length=LONGEST_NAME)]
"""Of an expert and its domain; also a file's name."""
NAME_RULE = "letters, digits, '_', '.' and '-', 64 at most, a letter or digit first"
"""What a `Name` is, in words."""

TAKEN = (BASE, "oracle", "mixture")
"""What no expert can be named: rows of the evaluation."""
RecipeData = dict[str, Any]
"""A recipe, or a part of one, as plain data, checked or not."""
RecipePart = Mapping[str, Any]
"""The same, to be read alone."""
_Model = TypeVar("_Model", bound=BaseModel)


_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def _parse_size(value: object) -> object:
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"([\d.]{1,20})([KMG]?I?B)", value.upper().replace(" ", ""), re.ASCII)
    if found is None or found[2] not in _UNITS or found[1].count(".") > 1:
        raise ValueError(f"'{value[:64]}' is not a size; write bytes or a number with one of {', '.join(_UNITS)}")
    return int(float(found[1]) * _UNITS[found[2]])


Size = Annotated[int, BeforeValidator(_parse_size, json_schema_input_type=int | str)]
"""In bytes, or like '5GB'."""


def is_name(found: str) -> bool:
    """Whether it could be a `Name`."""
    return len(found) <= LONGEST_NAME and re.fullmatch(_NAME, found) is not None


def breaks_name_rule(problem: str, context: Mapping[str, object]) -> bool:
    """Whether pydantic's problem of this type is that of a `Name`, whose pattern nobody should have to read."""
    return context.get("pattern") == _NAME or (problem == "string_too_long" and context.get("max_length") == LONGEST_NAME)


def did_you_mean(found: object, known: Iterable[str]) -> str:
    """A hint at the nearest of the words that are known; nothing where none is near."""
    words = list(known)
    near = difflib.get_close_matches(str(found), words, n=1) or [word for word in words if word.startswith(f"{found}_")]
    return f"did you mean '{near[0]}'?" if near else ""


class Strict(BaseModel, extra="forbid", frozen=True, strict=True, allow_inf_nan=False):
    """Part of a recipe: an unknown key, another type, or a number that is none is an error."""


def is_unset(value: object) -> bool:
    """Whether nobody has given a value, of a key that is then left out of what is written and of a digest."""
    return value is None


def checked(model: _Model, problems: list[str]) -> _Model:
    """The model, when nothing is wrong with it; else ValueError that holds every problem, one a line."""
    if problems:
        raise ValueError("\n".join(problems))
    return model
