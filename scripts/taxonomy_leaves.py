"""Every leaf of Fig. 3 of "A Survey on Mixture of Experts" (arXiv:2407.06204): the part of modekit that it is, or a reason.

It is data for one page and its tests, so that it stands in taxonomy_leaves.yaml and not in the package. A paper is
its name and arXiv number; those that are not on arXiv stand in the leaf's name. `recipe`, `adapters` (a recipe of adapters),
`training` or `command` turn a leaf on; `reason` is one that several share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import yaml
from typer.main import get_command

from modekit.cli.shell import app
from modekit.errors import TrainingError
from modekit.recipes.read import parse_recipe
from modekit.training.settings import TrainSettings, checked_settings

EXPERTS = ("law", "code", "science")


class Part(Protocol):
    """What turns a leaf on."""

    @property
    def said(self) -> str:
        """As a user writes it."""
        ...

    def check(self) -> None:
        """Raise ModekitError where it is not there."""
        ...


@dataclass(frozen=True)
class Recipe:
    """Lines of a recipe; `adapters`: of one whose experts are adapters."""

    said: str
    adapters: bool = False

    def check(self) -> None:
        """Parse it into a recipe of three experts."""
        kind = "adapter" if self.adapters else "model"
        experts = [{"name": name, kind: f"./{name}", "text": f"./{name}.jsonl"} for name in EXPERTS]
        parse_recipe({"base_model": "./base", "experts": experts, **yaml.safe_load(f"{{{self.said}}}")}, where=self.said)


@dataclass(frozen=True)
class Training:
    """Lines of a training's settings."""

    said: str

    def check(self) -> None:
        """Parse them."""
        settings: dict[str, Any] = yaml.safe_load(f"{{{self.said}}}")
        checked_settings(settings, TrainSettings, where=self.said)


@dataclass(frozen=True)
class Command:
    """A command line."""

    said: str

    def check(self) -> None:
        """Look the command and its options up."""
        _, name, *words = self.said.split()
        commands = getattr(get_command(app), "commands", {})
        if name not in commands:
            raise TrainingError(
                "no such command", where=self.said, found=name, expected=", ".join(commands), remedy="correct it"
            )
        known = {option for each in commands[name].params for option in (*each.opts, *each.secondary_opts)}
        for word in words:
            if word.startswith("-") and word.partition("=")[0] not in known:
                raise TrainingError(
                    "no such option", where=self.said, found=word, expected=", ".join(known), remedy="correct it"
                )


@dataclass(frozen=True)
class Leaf:
    """A leaf of the figure.

    Attributes:
        group: its branch.
        papers: name and arXiv number, the one that began it first.
        part: what turns it on; None where there is none.
        test: file below tests/ and function.
        measured: a row of benchmarks/taxonomy.md, or another page of benchmarks/.
        note: what differs from the paper; without a part, the reason.
    """

    group: str
    name: str
    papers: tuple[str, ...]
    part: Part | None = None
    test: str = ""
    measured: str = ""
    note: str = field(default="", kw_only=True)


_PARTS: dict[str, Callable[..., Part]] = {
    "recipe": Recipe,
    "adapters": partial(Recipe, adapters=True),
    "training": Training,
    "command": Command,
}
_KEYS = {*_PARTS, "papers", "reason", "note", "test", "measured"}


def _leaf(group: str, name: str, said: Mapping[str, str], reasons: Mapping[str, str]) -> Leaf:
    if not said.keys() <= _KEYS:
        raise KeyError(f"{name}: {said.keys() - _KEYS}")
    part = next((make(said[key]) for key, make in _PARTS.items() if key in said), None)
    note = reasons[said["reason"]] if "reason" in said else said.get("note", "")
    return Leaf(group, name, tuple(said["papers"].split(", ")), part, said.get("test", ""), said.get("measured", ""), note=note)


def _leaves() -> list[Leaf]:
    said = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    reasons = said.pop("reasons")
    return [_leaf(group, name, leaf, reasons) for group, leaves in said.items() for name, leaf in leaves.items()]


LEAVES = _leaves()
