"""The blocks of the tutorial and the Python page run, in order, in an empty folder; recipes and tables shown are checked."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import get_args

import pytest
import yaml

import families_table
import size_table
from command_line import modekit
from conftest import QUICK_DEMO
from modekit.recipes.read import parse_recipe
from modekit.recipes.recipe import Recipe
from modekit.training.settings import WEIGHTS, Group, TrainSettings

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[str, str]]:
    return BLOCK.findall((ROOT / page).read_text())


def run_line(line: str) -> None:
    """A line of a shell block: `modekit` in this process, which saves the seconds of importing torch, the rest in a shell."""
    words = shlex.split(line, comments=True)
    if words[:1] == ["modekit"]:
        modekit(*words[1:])
        return
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
def test_the_tutorial_and_the_python_page_run(tmp_path: Path, quick_demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert QUICK_DEMO in blocks("docs/tutorial.md")[0][1]
    for kind, text in [*blocks("docs/tutorial.md"), *blocks("docs/python.md")]:
        if kind == "yaml":
            (tmp_path / text.splitlines()[0].removeprefix("# file: ")).write_text(text)
            continue
        if kind == "python":
            exec(compile(text, "docs/tutorial.md", "exec"), {"__name__": "__main__"})
            continue
        for line in text.replace("\\\n", " ").splitlines():
            shutil.copytree(quick_demo, "demo") if line == QUICK_DEMO else run_line(line)


@pytest.mark.parametrize("page", ["docs/tutorial.md", "docs/labels.md"])
def test_every_recipe_shown_is_a_recipe(page: str) -> None:
    recipes = [text for kind, text in blocks(page) if kind == "yaml" and "# file: training.yaml" not in text]
    assert recipes
    for text in recipes:
        parse_recipe(yaml.safe_load(text))


def test_the_recipe_page_names_every_key() -> None:
    page = (ROOT / "docs/recipe.md").read_text()

    def keys(schema: dict, definitions: dict, prefix: str = "") -> set[str]:  # type: ignore[type-arg]
        found = set()
        for name, entry in schema.get("properties", {}).items():
            target = entry
            suffix = ""
            items = entry.get("items", {})
            items = next((each for each in items.get("anyOf", ()) if "$ref" in each), items)  # or a word in short
            if entry.get("type") == "array" and "$ref" in items:
                target, suffix = items, "[]"
            if "$ref" in target:
                inner = definitions[target["$ref"].split("/")[-1]]
                found |= keys(inner, definitions, f"{prefix}{name}{suffix}.")
            else:
                found.add(prefix + name)
        return found

    schema = Recipe.model_json_schema()
    missing = {key for key in keys(schema, schema["$defs"]) if f"`{key}`" not in page}
    assert not missing


def test_every_setting_of_a_training_is_explained() -> None:
    page = (ROOT / "docs/training.md").read_text()
    named = [*TrainSettings.model_fields, *WEIGHTS, *get_args(Group)]
    assert not [name for name in named if f"`{name}" not in page]


def test_the_table_of_families_is_up_to_date() -> None:
    assert families_table.PAGE.read_text(encoding="utf-8") == families_table.page(), "run python scripts/families_table.py"


def test_the_table_of_sizes_is_what_the_planner_says() -> None:
    assert size_table.PAGE.read_text(encoding="utf-8") == size_table.page(), "run python scripts/size_table.py"


def test_no_page_has_a_gap_left() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]:
        assert "@@" not in page.read_text() and "TODO" not in page.read_text(), page.name


def test_relative_links_lead_somewhere() -> None:
    for page in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "benchmarks").glob("*.md"),
    ]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
