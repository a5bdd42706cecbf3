"""Settings as words, KEY=VALUE, checked by the class of the room that reads them.

    modekit train OUT steps=100 what=[routers,attention]

`--help` of such a command lists the keys with their defaults and meaning from that class.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pkgutil import resolve_name
from typing import Annotated, Any, get_args, get_origin

import typer
import yaml

from modekit.errors import ModekitError

Words = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings, listed below; values as in YAML.")]
SETTINGS = {
    "train": ["modekit.training.settings:TrainSettings"],
    "fit": ["modekit.recipes.router:Router", "modekit.recipes.mixture:Mixture"],
    "specialize": ["modekit.loaded.text_training:Training", "modekit.experts.distill.settings:DistillSettings"],
    "balance": ["modekit.experts.corpus.balanced:BalanceSettings"],
    "add": ["modekit.recipes.recipe:Expert"],
    "replace": ["modekit.recipes.recipe:Expert"],
}
"""Command -> classes whose fields its words may name. They need no torch."""


def said_in(words: Sequence[str] | None, known: Iterable[str], command: str) -> dict[str, Any]:
    """Key -> value, as in YAML, of the words of a command. Raises ModekitError, with the nearest of the known keys."""
    from modekit.recipes.strict import did_you_mean

    keys, said = sorted(known), dict[str, Any]()
    for word in words or ():
        key, sign, value = word.partition("=")
        if not sign or key not in keys:
            hint = did_you_mean(key.lstrip("-").replace("-", "_"), keys)
            raise ModekitError(
                "this is no setting",
                where=word,
                expected="KEY=VALUE",
                remedy=f"{hint + ' ' if hint else ''}modekit {command} --help lists the settings",
            )
        try:
            said[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ModekitError("the value cannot be read", where=word, expected="a value as in YAML") from None
    return said


def described(command: str) -> str:
    """The settings that a command takes, for its help: a paragraph for each."""
    kinds = [resolve_name(name) for name in SETTINGS.get(command, ())]
    return "\n\n".join(["Settings:", *(line for kind in kinds for line in _lines_of(kind))]) if kinds else ""


def _lines_of(kind: Any) -> Iterable[str]:
    for key, field in kind.model_fields.items():
        meaning = field.description or _choices(field.annotation)
        default = "" if field.is_required() else f" [{_shown(field.get_default(call_default_factory=True))}]"
        yield f"{field.alias or key}{default}{': ' if meaning else ''}{meaning}"


def _shown(value: object) -> str:
    return "none" if value is None else str(value).replace("'", "")


def _choices(annotation: Any) -> str:
    """The words that a setting may have, where there are such."""
    if get_origin(annotation) is not None and all(isinstance(each, str) for each in get_args(annotation)):
        return ", ".join(get_args(annotation))
    return next((found for each in get_args(annotation) if (found := _choices(each))), "")
