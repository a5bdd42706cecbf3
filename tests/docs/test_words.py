"""docs/words.md is kept: no name in the source, the recipe or the command line uses a word that the page rules out."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

from modekit.cli.shell import app
from modekit.recipes.recipe import Recipe

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| ([^|]+) \| ([^|]+) \| ([^|]*) \|$", re.MULTILINE)


def ruled_out() -> dict[str, str]:
    """Word that is not used -> the word that is."""
    rows = ROW.findall((ROOT / "docs/words.md").read_text())[1:]
    return {other.strip(): word.strip() for word, _, others in rows for other in others.split(",") if other.strip()}


def parts(name: str) -> list[str]:
    """gate_ED -> gate, ed; NativeShape -> native, shape."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().strip("_").split("_")


def uses(word: str, name: str) -> bool:
    wanted, found = word.lower().split(), parts(name)
    return any(found[start : start + len(wanted)] == wanted for start in range(len(found)))


def names_of(file: Path) -> set[str]:
    """Every name that a source file defines."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
                names.add(name)
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                names.add(name)
    return names | {file.stem}


def test_the_table_rules_something_out() -> None:
    assert {"topk": "top_k", "parent": "base model"}.items() <= ruled_out().items()
    assert uses("bodies", "SharedBodies")
    assert uses("seed model", "seed_model_of") and not uses("seed model", "seed")


def test_names_in_the_source() -> None:
    wrong = [
        f"{file.relative_to(ROOT)}: {name} (say {word})"
        for file in (ROOT / "src/modekit").rglob("*.py")
        for name in sorted(names_of(file))
        for other, word in ruled_out().items()
        if uses(other, name)
        and not (other == "parent" and name in {"parent", "parents"})  # of a folder, as pathlib says
        and not (other == name == "compile" and file.name == "bounded.py")  # of what stands in for the module re
    ]
    assert not wrong


def test_keys_of_the_recipe() -> None:
    schema = Recipe.model_json_schema()
    keys = {key for entry in [schema, *schema["$defs"].values()] for key in entry.get("properties", {})}
    assert not [key for key in keys for other in ruled_out() if uses(other, key)]


def options() -> list[str]:
    group = get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    return [option for command in commands_of(group) for each in command.params for option in each.opts]


def commands_of(group: typer.core.TyperGroup) -> list[Any]:
    """Every command, those of groups among them."""
    return [
        each
        for command in group.commands.values()
        for each in (commands_of(command) if isinstance(command, typer.core.TyperGroup) else [command])
    ]


@pytest.mark.parametrize("option", sorted(set(options())))
def test_options_of_the_command_line(option: str) -> None:
    assert not [other for other in ruled_out() if uses(other, option.strip("-").replace("-", "_"))]
