"""The command line must refuse: exit code 2, one error that says what to do, no traceback, nothing left behind."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from command_line import ended
from conftest import Workshop

Tree = dict[str, bytes | None]
"""Every path below a folder -> its bytes, None for a folder."""


def tree(folder: Path) -> Tree:
    """What lies below a folder, with every byte."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def refuse(*args: object) -> str:
    """Run `modekit ARGS` in this process and return its error message."""
    return checked(*ended(*args))


def checked(code: object, stdout: str, stderr: str, *, expected: int = 2) -> str:
    """Check what every refusal has in common, whatever the process it happened in."""
    assert code == expected, f"exit code {code}: {stdout}{stderr}"
    assert stdout == ""
    assert "error: " in stderr
    stages, stderr = stderr[: stderr.index("error: ")], stderr[stderr.index("error: ") :]
    assert all(re.match(r"\d+:\d\d  \S|note: ", line) for line in stages.splitlines()), f"not only stages: {stages}"
    assert [line.startswith("error: ") for line in stderr.splitlines()].count(True) == 1, stderr
    assert "Traceback" not in stderr
    assert "\n  where: " in stderr, f"no place: {stderr}"
    assert "\n  to do: " in stderr or "\n  - " in stderr, f"no remedy: {stderr}"
    return stderr


def without(package: str, importer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the rest of the test a package is not installed, and what imports it has not been imported yet."""
    for name in [name for name in sys.modules if name.startswith((f"{package}.", importer))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)


def refuse_build(workshop: Workshop, *flags: str, **changes: Any) -> str:
    """Build the workshop's recipe with changes to OUT; it must be refused and the folder must be as before."""
    recipe = workshop.write(**changes)
    before = tree(workshop.root)
    message = refuse("build", recipe, workshop.root / "OUT", *flags)
    assert tree(workshop.root) == before
    return message


def run_python(code: str, *args: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own, with the package and the tests importable."""
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1] / "src")])
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
        **options,
    )


WITHOUT_TORCH = """
import sys
from modekit.cli.shell import main
try:
    main()
finally:
    assert not {'torch', 'transformers'} & set(sys.modules)
"""


def without_torch(*args: object) -> str:
    """What `modekit ARGS` prints in a process of its own, which must end well and import no torch."""
    done = run_python(WITHOUT_TORCH, *args)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def borrow(shared: Workshop, root: Path, count: int | None = None) -> Workshop:
    """A workshop of one test that reads the shared models and texts where they are: of all experts, or the first `count`."""
    experts = [
        {**expert, "model": str(shared.root / expert["model"]), "text": str(shared.root / expert["text"])}
        for expert in shared.recipe["experts"][:count]
    ]
    return Workshop(root, {**shared.recipe, "base_model": str(shared.root / "base"), "experts": experts})


def copy_expert(workshop: Workshop, place: int = 1) -> Path:
    """Give the workshop a copy of one expert's model that a test may damage."""
    expert = workshop.recipe["experts"][place]
    folder = workshop.root / expert["name"]
    shutil.copytree(expert["model"], folder)
    workshop.recipe["experts"][place] = {**expert, "model": f"./{expert['name']}"}
    return folder


def copy_base(workshop: Workshop) -> Path:
    """Give the workshop a copy of the base model that a test may damage."""
    folder = workshop.root / "base"
    shutil.copytree(workshop.recipe["base_model"], folder)
    workshop.recipe["base_model"] = "./base"
    return folder
