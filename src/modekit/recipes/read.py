"""A recipe file -> Recipe, with every problem explained at its key."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import ValidationError

from modekit.errors import RecipeError
from modekit.files.read import read_text
from modekit.recipes.choices import choices
from modekit.recipes.paths import spelled_out
from modekit.recipes.problems import explain
from modekit.recipes.recipe import Recipe
from modekit.recipes.strict import RecipeData

_MOST_PROBLEMS = 20  # shown at once; the others are counted
_LONGEST_LINE = 400  # characters
LARGEST = 2**20
"""Bytes of a file: far more than any recipe has, and what the parser reads within seconds."""
_MOST, _CHARACTERS = 2**16, 256  # values once every alias is written out, a long text counting as several
_DEEPEST = 50  # collections within each other
_LARGEST_NUMBER = 10**100


def load_recipe(path: Path) -> Recipe:
    """Read a recipe from a YAML file.

    Raises RecipeError that lists every problem with its key; a misspelt key is answered with the nearest known one.
    """
    return parse_recipe(read_recipe(path), where=str(path))


def read_recipe(path: Path) -> RecipeData:
    """The mapping that a YAML file holds, unchecked, its experts said in full. Raises RecipeError."""
    where = str(path)
    if path.is_dir():
        own, other = path / "recipe.yaml", f"a recipe.yaml; modekit inspect {path} looks at a mixture"
        remedy = f"give the path of {own if own.is_file() else other}"
        raise RecipeError("this is a folder, not a recipe", where=where, remedy=remedy)
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
    """Refuses a key given twice, of which YAML would silently drop the first; values that are none; bombs of aliases."""

    _size = _depth = 0

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._sizes: dict[str | None, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """The next node. Raises YAMLError as soon as there are too many, each alias written out, or they nest too deeply."""
        event, before = self.peek_event(), self._size  # type: ignore[no-untyped-call]
        self._depth += 1
        if isinstance(event, yaml.AliasEvent):
            self._size += self._sizes.get(event.anchor, _MOST if event.anchor in self.anchors else 0)
        else:
            self._size += 1 + len(getattr(event, "value", "")) // _CHARACTERS
        if self._size > _MOST or self._depth > _DEEPEST:
            what = "nested too deeply" if self._depth > _DEEPEST else f"more than {_MOST} values, aliases written out"
            raise yaml.composer.ComposerError(None, None, what, event.start_mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        if event.anchor is not None:
            self._sizes[event.anchor] = self._size - before
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> object:
        """The value of a node. Raises YAMLError where it is none of its kind: 2001-99-99, !!int x, half of a character."""
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, str):
                value.encode()
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError):
            raise _problem(f"this is no {node.tag.rpartition(':')[2][:40]}", node) from None
        if isinstance(value, int) and abs(value) >= _LARGEST_NUMBER:
            raise _problem("a number of more than 100 digits", node)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        """Build a dict from a YAML mapping."""
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise _problem(f"'{key.value[:100]}' is given twice", key)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> object:
    """What a YAML file holds, unchecked. Raises OSError, and ValueError that says what is wrong where."""
    return parse_yaml(read_text(path, LARGEST), path.name)


def parse_yaml(text: str, name: str) -> object:
    """What YAML of that name says, unchecked. Raises ValueError that says what is wrong where."""
    try:
        return yaml.load(text, StrictLoader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split()).replace('"<unicode string>"', name)) from None


def _problem(what: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, what, node.start_mark)
