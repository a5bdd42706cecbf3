"""The advised recipe as a file: the user's models and texts, the advised mixture, and the reasons as comments."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from modekit.errors import OutputError
from modekit.files.write import write_file
from modekit.recipes.paths import from_folder
from modekit.search.advise.advice import Advice
from modekit.search.advise.findings import Finding
from modekit.search.advise.rules import Choice

_WIDTH = 110


def recipe_text(recipe: Mapping[str, Any], choices: Sequence[Choice], findings: Sequence[Finding]) -> str:
    """YAML of the advised recipe (plain data, as `recipe.parse_recipe` takes it) with comments."""
    parts = ["# As `modekit advise` says; docs/advise.md has what its figures mean.\n"]
    for finding in findings:
        if finding.level != "note":
            parts.append(_comment(f"{finding.level}: {finding.about}: {finding.what}. {finding.to_do}"))
    before = {key: value for key, value in recipe.items() if key in ("base_model", "revision", "experts")}
    after = {key: value for key, value in recipe.items() if key not in ("base_model", "revision", "experts", "mixture")}
    parts += [_yaml(before)]
    for choice in choices:
        parts += [_comment(f"{choice.why}."), _comment(f"  ({choice.source})")]
    parts += [_yaml({"mixture": recipe["mixture"]}), *([_yaml(after)] if after else [])]
    return "".join(parts)


def check_target(path: Path) -> None:
    """Raise OutputError when a recipe cannot be written there; asked before the work that leads to it."""
    if path.exists():
        raise OutputError("the file exists", where=str(path), remedy="give another name to --write, or remove the file")
    if not path.absolute().parent.is_dir():
        raise OutputError("the folder does not exist", where=str(path.absolute().parent), remedy="make it, or correct --write")


def write_advised(path: Path, advice: Advice) -> None:
    """Write the advised recipe so that it can be built from where it lies. Raises OutputError."""
    check_target(path)
    assert advice.recipe is not None
    data = from_folder(advice.recipe, advice.root, path.resolve().parent)
    write_file(path, recipe_text(data, advice.choices, advice.findings).encode())


def _yaml(data: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True, width=_WIDTH)


def _comment(text: str) -> str:
    """Lines of comment; whatever a path or model says in it stays on them and is printable."""
    indent = "# " + " " * (len(text) - len(text.lstrip()))
    printable = "".join(character if character.isprintable() else "?" for character in " ".join(text.split()))
    lines = textwrap.wrap(printable, _WIDTH, initial_indent=indent, subsequent_indent=indent)
    return "".join(f"{line}\n" for line in lines)
