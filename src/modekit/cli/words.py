"""Settings as words, KEY=VALUE, checked by the class of the room that reads them.

    modekit train OUT steps=100 what=[routers,attention]

`--help` of such a command lists the keys with their defaults and meaning from that class.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from modekit.errors import ModekitError

if TYPE_CHECKING:
    from pydantic import BaseModel

    from modekit.recipes.strict import RecipeData

_Kind = TypeVar("_Kind", bound="BaseModel")
Words = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings, listed below; values as in YAML.")]
SETTINGS = {
    "train": ["modekit.training.settings:TrainSettings"],
    "fit": ["modekit.recipes.mixture:Router", "modekit.recipes.mixture:Mixture"],
    "densify": ["modekit.cli.conversion:DensifySettings"],
    "add": ["modekit.recipes.recipe:Expert"],
    "replace": ["modekit.recipes.recipe:Expert"],
    "specialize": ["modekit.experts.settings:SpecialistSettings"],
    "balance": ["modekit.experts.corpus.balance:BalanceSettings"],
}
"""Command -> classes whose fields its words may name. They need no torch."""
_NO_WORDS = {"router", "name", "model", "adapter", "text"}
"""Fields that hold others, or are options."""


def said_in(words: Sequence[str] | None, command: str, *, besides: Iterable[str] = ()) -> RecipeData:
    """Key -> value, as in YAML, of the words of a command.

    `besides`: keys that none of its classes has. Raises ModekitError, with the nearest of the known keys.
    """
    from modekit.recipes.read import parse_yaml
    from modekit.recipes.strict import did_you_mean

    keys, said = sorted([*_fields(command), *besides]), dict[str, Any]()
    for word in words or ():
        key, sign, value = word.partition("=")
        if key in said:
            raise ModekitError("a setting is given twice", where=word, remedy="leave one of them out")
        if not sign or key not in keys:
            hint = did_you_mean(key.lstrip("-").replace("-", "_"), keys)
            raise ModekitError(
                "this is no setting",
                where=word,
                expected="KEY=VALUE",
                remedy=f"{hint + ' ' if hint else ''}modekit {command} --help lists the settings",
            )
        try:
            said[key] = parse_yaml(value, key)
        except ValueError as error:
            raise ModekitError("the value cannot be read", where=word, found=error, expected="a value as in YAML") from None
    return said


def settings_in(words: Sequence[str] | None, kind: type[_Kind], command: str) -> _Kind:
    """The words of a command as the class that reads them. Raises ModekitError with the first thing that is wrong."""
    from modekit.files.typed import as_kind

    try:
        return as_kind(said_in(words, command), kind)
    except ValueError as error:
        raise ModekitError(
            "a setting is wrong", where=f"modekit {command}", found=error, remedy=f"modekit {command} --help lists the settings"
        ) from None


def list_settings(group: Any) -> None:
    """Put the settings of the commands of a group behind their help, where it is asked for one of them."""
    for name, command in getattr(group, "commands", {}).items():
        if name in sys.argv:
            command.epilog = described(name)
            list_settings(command)


def described(command: str) -> str:
    """The settings that a command takes, for its help: a paragraph for each."""
    lines = [_line_of(key, *field) for key, field in _fields(command).items()]
    return "\n\n".join(["Settings:", *lines]) if lines else ""


def _fields(command: str) -> dict[str, tuple[Any, str]]:
    """Key -> its field, and what it means."""
    from modekit.recipes.schema import meaning_of

    kinds = [resolve_name(name) for name in SETTINGS.get(command.rpartition(" ")[2], ())]
    named = [(kind, field.alias or key, field) for kind in kinds for key, field in kind.model_fields.items()]
    return {key: (field, field.description or meaning_of(kind, key)) for kind, key, field in named if key not in _NO_WORDS}


def _line_of(key: str, field: Any, meaning: str) -> str:
    meaning = meaning.replace("[", "\\[")
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    said = f" (default {default})" if isinstance(default, (str, int, float)) else ""
    return f"{key}{said}{': ' if meaning else ''}{meaning}"
