"""Options of a command as one value: a frozen dataclass whose fields are the options, by the same names.

    @dataclass(frozen=True)
    class Scored:
        tokens: Annotated[int, typer.Option(help="Held-out tokens per domain.")] = 8_192

    @app.command()
    @grouped
    def score(checkpoint: OutFolder, options: Scored) -> None: ...

gives `score CHECKPOINT --tokens 8192`. In a room's own class, which knows no Typer, pydantic's Field says the same.
Typer reads a function's signature, so that is what is made here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer
from pydantic.fields import FieldInfo

from modekit.errors import ModekitError

DomainTexts = Annotated[
    list[str] | None, typer.Option(help="domain=FILE, FOLDER or data set; repeatable. Default: the recipe's text.")
]


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose dataclass parameters are unfolded out into their fields."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    unfolded: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in groups:
            unfolded += _fields(groups[name])
        else:
            unfolded.append(_option(name, hints[name], parameter.default))

    @wraps(command)
    def run(**values: Any) -> None:
        given = {name: kind(**{each.name: values.pop(each.name) for each in fields(kind)}) for name, kind in groups.items()}
        command(**values, **given)

    run.__dict__["__signature__"] = inspect.Signature(unfolded)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in unfolded}
    return run


def _fields(kind: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(kind, include_extras=True)
    return [
        _option(each.name, hints[each.name], inspect.Parameter.empty if each.default is MISSING else each.default)
        for each in sorted(fields(kind), key=lambda each: each.kw_only is True)  # what commands have in common comes last
    ]


def _option(name: str, hint: Any, default: Any) -> inspect.Parameter:
    field = next((each for each in getattr(hint, "__metadata__", ()) if isinstance(each, FieldInfo)), None)
    if field is not None:
        pairs = [(end, each, key) for end, key in (("min", "ge"), ("max", "le")) for each in field.metadata]
        bounds = {end: getattr(each, key) for end, each, key in pairs if hasattr(each, key)}
        hint = Annotated[hint.__origin__, typer.Option(f"--{name.replace('_', '-')}", help=field.description, **bounds)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def texts_by_domain(text: list[str] | None) -> dict[str, list[str]]:
    """domain=FILE -> texts by domain. Raises ModekitError for anything else."""
    texts: dict[str, list[str]] = {}
    for each in text or []:
        domain, sign, spec = each.partition("=")
        if not sign or not domain or not spec:
            raise ModekitError(
                "a text without its domain", where="--text", found=each, remedy="write --text NAME=FILE, like law=law.jsonl"
            )
        texts.setdefault(domain, []).append(spec)
    return texts
