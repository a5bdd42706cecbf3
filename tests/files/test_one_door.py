"""Whatever is written, renamed or removed goes through the files room: no other file of the source does it itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "modekit"
CALLS = {
    "write_text", "write_bytes", "mkdir", "makedirs", "rmdir", "unlink", "rename", "touch", "symlink_to", "hardlink_to",
    "rmtree", "copyfile", "copy2", "copytree", "copyfileobj", "save_file", "save_pretrained", "truncate", "symlink",
    "link", "mkstemp", "NamedTemporaryFile", "TemporaryDirectory", "FileLock", "FileIO", "savez", "savefig", "to_csv",
}  # fmt: skip
ALLOWED = {
    ("routing/kept.py", "save_file"): "into a name that `appearing` gives",
    ("training/trainer.py", "save_file"): "into a name that `appearing` gives",
    ("training/finish.py", "save_pretrained"): "into OUT.training",
    ("experts/specialist_folder.py", "save_file"): "into a folder that `appearing` gives",
    ("experts/specialize.py", "save_pretrained"): "into a staged folder",
    ("experts/moving.py", "save_pretrained"): "into a staged folder",
    ("experts/distill/distill.py", "save_pretrained"): "into a staged folder",
    ("demo/models.py", "save_pretrained"): "into a staged folder",
    ("demo/modular.py", "save_pretrained"): "into a staged folder",
    ("demo/translation.py", "save_pretrained"): "into a staged folder",
    ("experts/corpus/tokenizer.py", "save_pretrained"): "into a staged folder",
    ("search/tune/study.py", "truncate"): "the log of a search, in OUT.tuning",
    ("report/plots.py", "savefig"): "into memory",
    ("cli/shell.py", "mkstemp"): "a log of an unforeseen error: a name nobody could foresee",
    ("cli/shell.py", "fdopen"): "that log",
}
"""What other libraries write for us, by file and call, and where it goes."""


def writes(tree: ast.AST) -> Iterator[str]:
    """Names of calls that change files."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        function = call.func
        name = function.attr if isinstance(function, ast.Attribute) else function.id if isinstance(function, ast.Name) else ""
        of = function.value.id if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) else ""
        if name in CALLS or (of == "os" and name in {"open", "remove", "replace", "write", "fdopen"}):
            yield name
        if name == "replace" and isinstance(function, ast.Attribute) and len(call.args) == 1 and not call.keywords:
            yield "replace"  # of a path: that of a text takes two
        if name == "open" and any(mode in said for said in _modes(call) for mode in "wax+"):
            yield "open"


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
    assert found - ALLOWED.keys() == set()


def test_the_search_sees_what_it_looks_for() -> None:
    code = (
        "Path('x').write_text('')\nopen('x', 'w')\npath.open('a+b')\npath.replace(other)\nos.replace(a, b)\n"
        "shutil.rmtree(x)\nos.open(x, 1)\nx.replace('a', 'b')\nopen('x')\ndataclasses.replace(a, b=1)\npath.open('rb')\n"
    )
    assert sorted(writes(ast.parse(code))) == ["open", "open", "open", "replace", "replace", "rmtree", "write_text"]
