"""A recipe file -> Recipe, with every problem explained at its key."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import yaml
from pydantic import ValidationError

from modekit.errors import RecipeError
from modekit.files.read import read_text
from modekit.files.typed import said_by
from modekit.recipes.choices import choices
from modekit.recipes.paths import spelled_out
from modekit.recipes.problems import explain
from modekit.recipes.recipe import Recipe
from modekit.recipes.strict import RecipeData

_MOST_PROBLEMS = 20  # shown at once; the others are counted
_LONGEST_LINE = 400  # characters
LARGEST = 2**18
"""Bytes of a file, also with every alias written out: far more than any recipe has, and read within seconds."""
_NO_VALUE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What YAML's parser and constructors raise for 2001-99-99, !!int x and what is nested without end."""


def load_recipe(path: Path) -> Recipe:
    """Read a recipe from a YAML file.

    Raises RecipeError that lists every problem with its key; a misspelt key is answered with the nearest known one.
    """
    return parse_recipe(read_recipe(path), where=str(path))


def read_recipe(path: Path) -> RecipeData:
    """The mapping that a YAML file holds, unchecked, its experts said in full. Raises RecipeError."""
    where = str(path)
    if path.is_dir():
        own = path / "recipe.yaml"
        other = f"a recipe.yaml; modekit inspect {path} looks at a mixture"
        raise RecipeError(
            "this is a folder, not a recipe",
            where=where,
            remedy=f"give the path of {own if own.is_file() else other}",
        )
    try:
        raw = read_yaml(path)
    except FileNotFoundError:
        raise RecipeError("the recipe does not exist", where=where, remedy="give the path of a recipe.yaml") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError("the recipe cannot be read", where=where, found=error, remedy="give a text file in UTF-8") from None
    except ValueError as error:
        remedy = "indent with spaces: YAML takes no tabs" if "'\\t'" in str(error) else "correct it at that place"
        raise RecipeError("the recipe is not YAML", where=where, found=error, remedy=remedy) from None
    if not isinstance(raw, dict):
        raise RecipeError(
            "the recipe is not a mapping of keys",
            where=where,
            expected="base_model: ..., experts: [...]",
            remedy="see docs/recipe.md",
        )
    return spelled_out(raw, path.resolve().parent)


def parse_recipe(raw: RecipeData, where: str = "recipe") -> Recipe:
    """Check a recipe given as plain data. Raises RecipeError with every problem."""
    try:
        recipe = Recipe.model_validate(raw)
        if recipe.mixture.is_open:
            choices(recipe)
        return recipe
    except ValidationError as error:
        lines = list(dict.fromkeys(line for problem in error.errors(include_url=False) for line in explain(dict(problem))))
        more = [f"and {len(lines) - _MOST_PROBLEMS} more"] if len(lines) > _MOST_PROBLEMS else []
        head = "the recipe has a problem" if len(lines) == 1 else f"the recipe has {len(lines)} problems"
        shown = [*(line[:_LONGEST_LINE] for line in lines[:_MOST_PROBLEMS]), *more]
        raise RecipeError(head + "".join(f"\n  - {line}" for line in shown), where=where) from None


class StrictLoader(yaml.SafeLoader):
    """Refuses a key given twice, of which YAML would silently drop the first, and bombs of aliases."""

    def construct_document(self, node: yaml.Node) -> object:
        """The value of a whole text. Raises YAMLError where it is too large with every alias written out."""
        if _written_out(node, {}) > LARGEST:
            raise _problem(f"more than {LARGEST:,} characters with every alias written out", node)
        return super().construct_document(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        """Build a dict from a YAML mapping."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise _problem(f"'{key.value[:100]}' is given twice", key)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _written_out(node: yaml.Node, sizes: dict[yaml.Node, int]) -> int:
    """Characters of a node with every alias written out; an empty value counts as one.

    Raises RecursionError where a node lies within itself.
    """
    if node not in sizes:
        if isinstance(node, yaml.ScalarNode):
            inside = len(node.value)
        else:
            parts = chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value
            inside = sum(_written_out(part, sizes) for part in parts)
        sizes[node] = 1 + inside
    return sizes[node]


def read_yaml(path: Path) -> object:
    """What a YAML file holds, unchecked. Raises OSError, and ValueError that says what is wrong where."""
    return parse_yaml(read_text(path, LARGEST), path.name)


def parse_yaml(text: str, name: str) -> object:
    """What YAML of that name says, unchecked. Raises ValueError that says what is wrong where."""
    try:
        value = yaml.load(text, StrictLoader)
        json.dumps(value, default=str, ensure_ascii=False).encode()  # no half characters, no endless numbers
        return value
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split()).replace('"<unicode string>"', name)) from None
    except _NO_VALUE as error:
        raise ValueError(f"{name} has a value that is none of its kind: {said_by(error)}") from None


def _problem(what: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, what, node.start_mark)
