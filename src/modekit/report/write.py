"""A report to disk: page, report.json, plots. The same checkpoint and results give the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.errors import OutputError
from modekit.evaluation.results_folder import RESULTS_FOLDER
from modekit.files.staging import write_atomically, write_json
from modekit.report.content import make_content
from modekit.report.page import make_page
from modekit.report.plots import make_plots

PAGE_FILE, PLOTS_FOLDER = "report.html", "plots"


@dataclass(frozen=True)
class Report:
    """What was written; `notes` say what had to be left out and how to get it."""

    page: Path
    data: Path
    plots: Sequence[Path]
    notes: Sequence[str]


def write_report(checkpoint: Checkpoint, *, page: Path | None = None) -> Report:
    """Write a report to `page` (default OUT/results/report.html), its data beside it as .json, plots in plots/.

    Raises OutputError when `page` is a folder, or its name ends in .json.
    """
    page = page or checkpoint.folder / RESULTS_FOLDER / PAGE_FILE
    if page.is_dir() or page.suffix == ".json":
        raise OutputError(
            "the page needs a name of its own", where=str(page), expected="a file like report.html",
            remedy="name the file to write",
        )  # fmt: skip
    content = make_content(checkpoint)
    html = make_page(content)
    notes = list(content["missing"])
    try:
        pictures = make_plots(content)
    except ImportError:
        pictures = {}
        notes.append("plots need matplotlib: pip install 'modekit[report]'")
    page.parent.mkdir(parents=True, exist_ok=True)
    data = page.with_suffix(".json")
    write_json(data, content)
    folder = page.parent / PLOTS_FOLDER
    if pictures:
        folder.mkdir(exist_ok=True)
    for name, picture in pictures.items():
        write_atomically(folder / name, picture)
    write_atomically(page, html.encode())
    return Report(page, data, [folder / name for name in pictures], notes)
