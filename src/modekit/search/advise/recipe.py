"""The advised recipe: the user's models and texts, the advised mixture; and as a file, with the reasons as comments."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import yaml
from pydantic import JsonValue

from modekit.errors import OutputError
from modekit.files.write import write_file
from modekit.recipes.edit import with_mixture
from modekit.recipes.paths import from_folder
from modekit.recipes.strict import BASE
from modekit.search.advise.result import Advice, Finding, Recommendation

_WIDTH = 110


def advised_recipe(
    raw: Mapping[str, JsonValue],
    kept: Mapping[int, bool],
    unread: Collection[int],
    choice: Recommendation,
    native: bool,
) -> dict[str, JsonValue]:
    """The recipe as plain data. `kept`: index of an expert -> whether it stands for itself, else the base does; `unread`:
    those whose text is left out.
    """
    given = raw["experts"]
    assert isinstance(given, list)
    experts: list[JsonValue] = []
    for index, is_own in sorted(kept.items()):
        expert = given[index]
        assert isinstance(expert, dict)
        expert = _without(expert, *(["text"] if index in unread else []), *(["as", "rank"] if native else []))
        if not is_own and expert.get("model") != BASE:
            rest = _without(expert, "name", "model", "adapter", "as", "rank", "revision")
            expert = {"name": expert["name"], "model": BASE, **rest}
        experts.append(expert)
    before = {**_without(raw, "experts", "mixture", "output", "eval"), "experts": experts, "mixture": {}}
    output = raw.get("output") or {}
    assert isinstance(output, dict)
    after = {"output": {**output, **({"format": "native"} if native else {})}, "eval": raw.get("eval")}
    return with_mixture({**before, **{key: value for key, value in after.items() if value}}, dict(choice.mixture))


def _without(mapping: Mapping[str, JsonValue], *keys: str) -> dict[str, JsonValue]:
    return {key: value for key, value in mapping.items() if key not in keys}


def recipe_text(recipe: Mapping[str, JsonValue], advice: Sequence[Recommendation], findings: Sequence[Finding]) -> str:
    """YAML of the advised recipe (plain data) with comments."""
    parts = ["# Recommended by `modekit advise`; docs/advise.md explains the figures.\n"]
    for finding in findings:
        if finding.level != "note":
            parts.append(_comment(f"{finding.level}: {finding.about}: {finding.what}. {finding.to_do}"))
    before = {key: value for key, value in recipe.items() if key in ("base_model", "revision", "experts")}
    after = {key: value for key, value in recipe.items() if key not in ("base_model", "revision", "experts", "mixture")}
    parts += [_yaml(before)]
    for choice in advice:
        parts += [_comment(f"{choice.why}."), _comment(f"  ({choice.source})")]
    parts += [_yaml({"mixture": recipe["mixture"]}), *([_yaml(after)] if after else [])]
    return "".join(parts)


def check_target(path: Path) -> None:
    """Raise OutputError when a recipe cannot be written there; asked before the work that leads to it."""
    if path.exists():
        raise OutputError("the file exists", where=str(path), remedy="give another name to --write, or remove the file")
    if not path.absolute().parent.is_dir():
        raise OutputError("the folder does not exist", where=str(path.absolute().parent), remedy="make it, or correct --write")


def write_advised(path: Path, advice: Advice, root: Path) -> None:
    """Write the advised recipe so that it builds from where it lies; its paths are relative to `root`. Raises OutputError."""
    check_target(path)
    assert advice.recipe is not None
    data = from_folder(advice.recipe, root, path.resolve().parent)
    write_file(path, recipe_text(data, advice.advice, advice.findings).encode())


def _yaml(data: Mapping[str, JsonValue]) -> str:
    return yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True, width=_WIDTH)


def _comment(text: str) -> str:
    """Lines of comment; whatever a path or model says in it stays on them and is printable."""
    indent = "# " + " " * (len(text) - len(text.lstrip()))
    printable = "".join(character if character.isprintable() else "?" for character in " ".join(text.split()))
    lines = textwrap.wrap(printable, _WIDTH, initial_indent=indent, subsequent_indent=indent)
    return "".join(f"{line}\n" for line in lines)
