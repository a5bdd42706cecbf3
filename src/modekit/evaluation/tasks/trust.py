"""A folder of tasks is read as data: Python that it names, and data sets that run code when read, need the flag.

Templates are another matter: they run in a sandbox (`harness.quiet`).
"""

from __future__ import annotations

from pathlib import Path

import yaml

from modekit.errors import ModekitError

_ALLOWS_CODE, _NO = {"trust_remote_code", "unsafe_code"}, {"false", "no", "off", "null", "~", ""}
_CODE_READERS = {"pandas", "webdataset", "spark"}  # builders of the datasets library that unpickle what they read


def check_folder(folder: Path, *, trusted: bool) -> None:
    """Raise ModekitError when a folder of tasks is not there, or brings code and is not trusted."""
    if not folder.is_dir():
        raise ModekitError(
            "the folder of tasks does not exist", where="--include-path", found=str(folder), remedy="correct the path"
        )
    for file in sorted(folder.rglob("*.yaml")) if not trusted else []:
        found = _code_in(file, set())
        if found:
            raise ModekitError(
                "the folder of tasks brings code of its own", where=f"--include-path: {file}", found=found,
                remedy="read it, and give --trust-remote-code if it may run",
            )  # fmt: skip


def _code_in(file: Path, visited: set[Path]) -> str | None:
    """What in a task file, or one that it includes, would run code or cannot be read; None when nothing does."""
    file = file.resolve()
    if file in visited:
        return None
    visited.add(file)
    try:
        root = yaml.compose(file.read_bytes())
    except (OSError, ValueError, yaml.YAMLError) as error:
        return f"what it says cannot be read: {str(error).splitlines()[0]}"  # the harness's parser may be another
    nodes, reached = [root], set()
    while nodes:
        node = nodes.pop()
        if node is None or id(node) in reached:
            continue
        reached.add(id(node))
        if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.startswith("tag:yaml.org,2002:python"):
            return f"{node.tag} {node.value}" if isinstance(node.value, str) else str(node.tag)
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                nodes += [key, value]
                found = _code_said(str(key.value), value, file.parent, visited)
                if found:
                    return found
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value
    return None


def _code_said(key: str, value: yaml.Node, folder: Path, visited: set[Path]) -> str | None:
    """The same for one key and its value."""
    said = str(value.value)
    if (key in _ALLOWS_CODE and said.lower() not in _NO) or (key == "dataset_path" and said in _CODE_READERS):
        return f"{key}: {said}"
    included = [] if key != "include" else [value] if isinstance(value, yaml.ScalarNode) else value.value
    return next(filter(None, (_code_in(folder / str(other.value), visited) for other in included)), None)
