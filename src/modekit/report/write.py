"""A report to disk: page, report.json, plots. The same checkpoint and results give the same bytes.

In OUT/results they replace what is there. Under another name they replace nothing but an earlier report.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.errors import OutputError
from modekit.evaluation.results_folder import RESULTS_FOLDER
from modekit.files.change import change_together
from modekit.files.read import LARGE, UNREADABLE, read_json, read_text
from modekit.files.write import json_bytes, make_folder
from modekit.report.content import make_content
from modekit.report.drawing import make_pictures
from modekit.report.page import GENERATOR, make_page

PAGE_FILE, PLOTS_FOLDER = "report.html", "plots"
_KEYS = {"format", "modekit_version", "mixture", "provenance"}
"""Of report.json, by which one is known."""


@dataclass(frozen=True)
class Report:
    """What was written; `notes` say what had to be left out and how to get it."""

    page: Path
    data: Path
    plots: Sequence[Path]
    notes: Sequence[str]


def write_report(checkpoint: Checkpoint, *, page: Path | None = None) -> Report:
    """Write a report to `page` (default OUT/results/report.html), its data beside it as .json, and plots.

    Plots of the default page lie in OUT/results/plots, of X.html in X-plots beside it. All of them appear together.

    Raises OutputError when `page` is a folder, its name ends in .json, or what it would replace is no report; OSError.
    """
    own = checkpoint.folder / RESULTS_FOLDER / PAGE_FILE
    page = page or own
    if page.is_dir() or page.suffix == ".json":
        raise OutputError(
            "the page needs a name of its own",
            where=str(page),
            expected="a file like report.html",
            remedy="name the file to write",
        )
    data = page.with_suffix(".json")
    plots = page.with_name(PLOTS_FOLDER if page == own else f"{page.stem}-{PLOTS_FOLDER}")
    content = make_content(checkpoint)
    pictures = make_pictures(content)
    files = {data: json_bytes(content.data), **{plots / name: picture for name, picture in pictures.items()}}
    files[page] = make_page(content).encode()
    if page != own:
        for path in _not_reports(page, data, plots, pictures):
            raise OutputError(
                "a file that is no report of modekit's would be lost", where=str(path), remedy="give the page another name"
            )
    _write(checkpoint, page, files)
    return Report(page, data, [plots / name for name in pictures], content.notes)


def _write(checkpoint: Checkpoint, page: Path, files: dict[Path, bytes]) -> None:
    """All together: as files of the checkpoint where the page lies in it, else in the page's folder."""
    inside = checkpoint.folder in page.parents
    folder = checkpoint.folder if inside else page.parent
    if not inside:
        make_folder(folder)
    change_together(folder, {path.relative_to(folder).as_posix(): content for path, content in files.items()})


def _not_reports(page: Path, data: Path, plots: Path, pictures: dict[str, bytes]) -> Iterator[Path]:
    """What is in the way and was not written by an earlier report of that name."""
    known = _is_report(data)
    if data.exists() and not known:
        yield data
    if page.exists() and not _is_page(page):
        yield page
    if not known:
        yield from (plots / name for name in pictures if (plots / name).exists())


def _is_report(path: Path) -> bool:
    try:
        content = read_json(path, LARGE)
    except UNREADABLE:
        return False
    return isinstance(content, dict) and content.keys() >= _KEYS


def _is_page(path: Path) -> bool:
    try:
        return GENERATOR in read_text(path, LARGE)
    except UNREADABLE:
        return False
