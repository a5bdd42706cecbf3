"""YAML that a stranger may have written -> plain data, or ValueError: nothing said twice, no bombs, and nothing that runs."""

from __future__ import annotations

from pathlib import Path

import yaml

from modekit.files.read import read_text

LARGEST = 2**20
"""Bytes of a file: far more than any recipe has, and what the parser reads within seconds."""
_MOST_NODES = 2**16  # once every alias is written out
_DEEPEST = 50  # collections within each other
_MOST_CHARACTERS = 2**24  # likewise
_LARGEST_NUMBER = 10**100


class StrictLoader(yaml.SafeLoader):
    """Refuses a key given twice, of which YAML would silently drop the first; values that are none; bombs of aliases."""

    _nodes = _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """The next node. Raises YAMLError as soon as there are too many, or they nest too deeply."""
        self._nodes, self._depth = self._nodes + 1, self._depth + 1
        if self._nodes > _MOST_NODES or self._depth > _DEEPEST:
            what = "nested too deeply" if self._depth > _DEEPEST else f"more than {_MOST_NODES} values"
            raise yaml.composer.ComposerError(None, None, what, self.peek_event().start_mark)  # type: ignore[no-untyped-call]
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        """The file's only document as nodes. Raises YAMLError also where aliases stand for too much, or for themselves."""
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _check_size(node, {})
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


def _check_size(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Nodes and characters below a node with every alias written out. Raises YAMLError where they are too many, or endless."""
    if id(node) in known:
        nodes, characters = known[id(node)]
        if not nodes:
            raise _problem("an alias that contains itself", node)
        return nodes, characters
    known[id(node)] = (0, 0)
    nodes, characters = 1, len(node.value) if isinstance(node, yaml.ScalarNode) else 0
    for entry in node.value if isinstance(node, yaml.CollectionNode) else ():
        for child in entry if isinstance(entry, tuple) else (entry,):
            below = _check_size(child, known)
            nodes, characters = nodes + below[0], characters + below[1]
    if nodes > _MOST_NODES or characters > _MOST_CHARACTERS:
        raise _problem("aliases that expand to too much", node)
    known[id(node)] = (nodes, characters)
    return nodes, characters


def _problem(what: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, what, node.start_mark)
