"""Whatever is written, renamed or removed goes through the files room: no other file of the source does it itself.

Where another library writes, it gets its place from that room, too: a new folder (`library_writes`, `new_folder`), a new name
(`appearing`), or a folder without links (`link_in`).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "modekit"
CALLS = {
    "write_text",
    "write_bytes",
    "mkdir",
    "makedirs",
    "rmdir",
    "unlink",
    "rename",
    "touch",
    "symlink_to",
    "hardlink_to",
    "rmtree",
    "copyfile",
    "copy2",
    "copytree",
    "copyfileobj",
    "truncate",
    "symlink",
    "link",
    "mkstemp",
    "NamedTemporaryFile",
    "TemporaryDirectory",
    "FileLock",
    "FileIO",
    "savez",
    "to_csv",
}
LIBRARIES = {
    "save_file",
    "save_pretrained",
    "savefig",
    "convert",
    "SummaryWriter",
    "JournalFileBackend",
    "JournalFileOpenLock",
    "snapshot_download",
    "hf_hub_download",
    "to_parquet",
    "save_to_disk",
    "save_model",
    "FileHandler",
}
"""Calls by which another library comes to write files."""
DOORS = {"library_writes", "appearing"}
"""What gives it a place: a call in such a block is in order."""
ALLOWED = {
    ("experts/moving.py", "save_pretrained"): "into the folder that specialist.py gets from `library_writes`",
    ("sources/hub.py", "snapshot_download"): "the hub's cache, which is the user's own",
    ("recipes/paths.py", "hf_hub_download"): "the hub's cache, which is the user's own",
    ("demo/models.py", "save_model"): "its own function, which writes into what it gets from `library_writes`",
    ("demo/translation.py", "save_model"): "the same function",
}
"""What other libraries write for us, by file and call, and where it goes."""


def writes(tree: ast.AST) -> Iterator[str]:
    """Names of calls that change files, or let another library, without a place from the files room."""
    behind_doors = set(_behind_doors(tree))
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        function, name = call.func, _name_of(call)
        if name in LIBRARIES:
            if call not in behind_doors:
                yield name
            continue
        of = function.value.id if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) else ""
        if name in CALLS or (of == "os" and name in {"open", "remove", "replace", "write", "fdopen"}):
            yield name
        if name == "replace" and isinstance(function, ast.Attribute) and len(call.args) == 1 and not call.keywords:
            yield "replace"  # of a path: that of a text takes two
        if name == "open" and any(mode in said for said in _modes(call) for mode in "wax+"):
            yield "open"


def _name_of(call: ast.Call) -> str:
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else function.id if isinstance(function, ast.Name) else ""


def _behind_doors(tree: ast.AST) -> Iterator[ast.AST]:
    """All that stands in blocks whose head calls a door."""
    for block in (node for node in ast.walk(tree) if isinstance(node, ast.With)):
        heads = [item.context_expr for item in block.items]
        if any(isinstance(head, ast.Call) and _name_of(head) in DOORS for head in heads):
            for statement in block.body:
                yield from ast.walk(statement)


def _modes(call: ast.Call) -> list[str]:
    first = 0 if isinstance(call.func, ast.Attribute) else 1
    given = [*call.args[first : first + 1], *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
    return [each.value for each in given if isinstance(each, ast.Constant) and isinstance(each.value, str)]


def test_nothing_else_writes() -> None:
    found = {
        (path.relative_to(SOURCE).as_posix(), name)
        for path in SOURCE.rglob("*.py")
        if path.parent.name != "files"
        for name in writes(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found == ALLOWED.keys()


def test_the_search_sees_what_it_looks_for() -> None:
    code = (
        "Path('x').write_text('')\nopen('x', 'w')\npath.open('a+b')\npath.replace(other)\nos.replace(a, b)\n"
        "shutil.rmtree(x)\nos.open(x, 1)\nx.replace('a', 'b')\nopen('x')\ndataclasses.replace(a, b=1)\npath.open('rb')\n"
    )
    assert sorted(writes(ast.parse(code))) == ["open", "open", "open", "replace", "replace", "rmtree", "write_text"]
