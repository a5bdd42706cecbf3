"""How the house stands, in numbers: size of files and functions, parameters, types, docstrings, tests.

    python scripts/measure_house.py            a table of this checkout, in Markdown
    python scripts/measure_house.py --check    exit code 1 when a bound of BOUNDS is broken
    python scripts/measure_house.py OTHER      the same of another checkout

Counted by the standard library's `ast`; nothing of the project is imported or run. A function's body is what stands after
its docstring, first line to last, inner functions included. A flag is handed down when a function takes a bool and passes it on
in a call.
"""

from __future__ import annotations

import argparse
import ast
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef

BOUNDS = {
    "entries at the root": 26,
    "source lines": 57_500,
    "file lines, median": 150,
    "file lines, max": 400,
    "function body, p90": 20,
    "function body, max": 40,
    "functions with more than six parameters": 11,
    "bool flags handed down": 39,
    "public signatures with Any": 60,
    "class names in two files or more": 10,
    "words of README and docs": 23_000,
}
"""Most that each figure may be."""


@dataclass(frozen=True)
class Measured:
    """One function: where, its body in lines, parameters, flags handed down; whether it is public, typed and documented."""

    where: str
    body: int
    parameters: int
    flags: int
    public: bool
    typed: bool
    documented: bool
    has_any: bool


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", nargs="?", type=Path, default=Path(__file__).resolve().parents[1])
    parser.add_argument("--check", action="store_true", help="fail when a bound is broken")
    parser.add_argument("--longest", type=int, default=5, help="how many of the longest bodies to name")
    options = parser.parse_args()
    figures, longest, crowded = measure(options.checkout)
    print("| figure | found | at most |\n|---|---|---|")
    for name, value in figures.items():
        shown = f"{value:.2f}" if isinstance(value, float) else str(value)
        print(f"| {name} | {shown} | {BOUNDS.get(name, '')} |")
    print(f"\nLongest bodies: {', '.join(f'{each.where} {each.body}' for each in longest[: options.longest])}.")
    print(f"Most parameters: {', '.join(f'{each.where} {each.parameters}' for each in crowded)}.")
    broken = [name for name, most in BOUNDS.items() if figures[name] > most]
    if options.check and broken:
        sys.exit(f"broken: {', '.join(broken)}")


def measure(checkout: Path) -> tuple[dict[str, float], list[Measured], list[Measured]]:
    """The figures by name; functions by length of body; functions with more than six parameters."""
    package = checkout / "src" / "modekit"
    files = sorted(package.rglob("*.py"))
    lines = [_lines(file) for file in files]
    functions = [each for file in files for each in functions_of(file, package)]
    bodies = sorted(each.body for each in functions)
    public = [each for each in functions if each.public]
    crowded = sorted((each for each in functions if each.parameters > 6), key=lambda each: -each.parameters)
    root = [path for path in package.iterdir() if path.name not in {"__pycache__", "__init__.py", "__main__.py"}]
    tests = sum(
        _lines(file) for file in (checkout / "tests").rglob("*.py") if "old" not in file.parts
    )  # kept checkpoints' code
    pages = [checkout / "README.md", *(checkout / "docs").glob("*.md")]
    figures: dict[str, float] = {
        "entries at the root": len(root),
        "files": len(files),
        "source lines": sum(lines),
        "file lines, median": int(statistics.median(lines)),
        "file lines, max": max(lines),
        "functions": len(functions),
        "function body, median": int(statistics.median(bodies)),
        "function body, p90": bodies[int(0.9 * len(bodies))],
        "function body, max": bodies[-1],
        "functions with more than six parameters": len(crowded),
        "bool flags handed down": sum(each.flags for each in functions),
        "public functions typed, %": round(100 * sum(each.typed for each in public) / len(public)),
        "public functions documented, %": round(100 * sum(each.documented for each in public) / len(public)),
        "public signatures with Any": sum(each.has_any for each in public),
        "class names in two files or more": sum(count > 1 for count in _classes(files).values()),
        "words of README and docs": sum(len(page.read_text(encoding="utf-8").split()) for page in pages if page.exists()),
        "test : source lines": tests / sum(lines),
    }
    return figures, sorted(functions, key=lambda each: -each.body), crowded


def functions_of(file: Path, package: Path) -> Iterator[Measured]:
    """Every function and method of a file; those inside functions count with what holds them."""
    where = str(file.relative_to(package).with_suffix(""))

    def walk(node: ast.AST, public: bool, method: bool) -> Iterator[Measured]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                yield from walk(child, public and not child.name.startswith("_"), True)
            elif isinstance(child, Function):
                yield _measured(child, f"{where}:{child.name}", public and not child.name.startswith("_"), method)
            elif isinstance(child, ast.If | ast.Try):
                yield from walk(child, public, method)

    yield from walk(ast.parse(file.read_text(encoding="utf-8")), True, False)


def _measured(function: Function, where: str, public: bool, method: bool) -> Measured:
    documented = ast.get_docstring(function) is not None
    body = function.body[1:] if documented else function.body
    length = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    if method and every and every[0].arg in {"self", "cls"}:
        every = every[1:]
    extra = [each for each in (arguments.vararg, arguments.kwarg) if each is not None]
    typed = function.returns is not None and all(each.annotation is not None for each in [*every, *extra])
    hints = [ast.unparse(each.annotation) for each in [*every, *extra] if each.annotation is not None]
    hints += [ast.unparse(function.returns)] if function.returns is not None else []
    bools = {each.arg for each in every if each.annotation is not None and ast.unparse(each.annotation) == "bool"}
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    passed = [value for call in calls for value in [*call.args, *(keyword.value for keyword in call.keywords)]]
    flags = len(bools & {value.id for value in passed if isinstance(value, ast.Name)})
    return Measured(where, length, len(every), flags, public, typed, documented, any("Any" in hint for hint in hints))


def _classes(files: Sequence[Path]) -> Counter[str]:
    """In how many files each name of a class stands."""
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    return Counter(name for tree in trees for name in {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)})


def _lines(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


if __name__ == "__main__":
    main()
