"""The site of docs/, its pictures, the README's length, and the notebook."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pictures

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "mix.ipynb"
_SECTIONS = ["Start here", "How-to", "Reference", "Background"]
_LARGEST = 60_000  # bytes of a picture


def test_every_page_stands_in_the_navigation_once() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    assert re.findall(r"^  - ([^:]+):$", navigation, re.MULTILINE) == _SECTIONS
    named = re.findall(r": (\S+\.md)$", navigation, re.MULTILINE)
    assert sorted(named) == sorted([*(page.name for page in (ROOT / "docs").glob("*.md")), "benchmarks/README.md"])


def test_the_site_is_built_and_fetches_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="the extra `docs` is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    fetched = re.compile(r"""<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)""")
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(list((ROOT / "docs").glob("*.md")))
    assert {address for page in pages for address in fetched.findall(page.read_text(encoding="utf-8"))} == set()
    # An item of a list that Markdown took for a line of a paragraph.
    literal = re.compile(r"(?:\n|<p>)(?:\*|\d+\.) ")
    code = re.compile(r"<(pre|code|script|style)\b.*?</\1>", re.DOTALL)
    prose = {page.name: code.sub("", page.read_text(encoding="utf-8")) for page in pages}
    assert [name for name, text in prose.items() if literal.search(text)] == []
    assert "benchmarks/auto.html" in (tmp_path / "routers.html").read_text(encoding="utf-8")
    assert (tmp_path / "images" / "gaps.svg").is_file()


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_a_picture_is_what_its_command_draws(name: str) -> None:
    assert (pictures.IMAGES / name).read_text(encoding="utf-8") == pictures.PICTURES[name](), "run python scripts/pictures.py"


def test_pictures_are_small_and_shown() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    for picture in pictures.IMAGES.iterdir():
        assert picture.stat().st_size < _LARGEST, picture.name
        assert f"images/{picture.name})" in text


def test_the_readme_is_short_and_has_one_picture() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 630
    assert text.count("![") == 1


def test_the_notebook_shows_results_and_nobodys_folders() -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert any(cell["outputs"] for cell in cells)
    assert not re.search(r"/(tmp|home|root|work|Users)/", json.dumps(cells))


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, quick_demo: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason="the extra `docs` is not installed")
    client = pytest.importorskip("nbclient", reason="the extra `docs` is not installed")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    shutil.copytree(quick_demo, tmp_path / "demo")  # from which its first command goes on
    client.NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = "".join(str(output) for cell in notebook.cells for output in cell.get("outputs", ()))
    assert "{'proven'}" in said and "| oracle |" in said
    assert re.findall(r"-> (\w+)", said) == ["law", "code", "general"]
    assert (tmp_path / "mixture" / "results" / "report.html").is_file()
