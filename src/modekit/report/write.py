"""A report to disk: page, report.json, plots. The same checkpoint and results give the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.evaluation.results_folder import RESULTS_FOLDER, write_results
from modekit.files.write import json_bytes
from modekit.report.content import make_content
from modekit.report.drawing import make_pictures
from modekit.report.page import make_page

PAGE_FILE, PLOTS_FOLDER = "report.html", "plots"


@dataclass(frozen=True)
class Report:
    """What was written; `notes` say what had to be left out and how to get it."""

    page: Path
    plots: Sequence[Path]
    notes: Sequence[str]


def write_report(checkpoint: Checkpoint) -> Report:
    """Write OUT/results/report.html, its data beside it as report.json, and plots, together. Raises OutputError, OSError."""
    content, folder = make_content(checkpoint), checkpoint.folder / RESULTS_FOLDER
    plots = {f"{PLOTS_FOLDER}/{name}": picture for name, picture in make_pictures(content).items()}
    page = make_page(content).encode()
    write_results(checkpoint, {"report.json": json_bytes(content.data), **plots, PAGE_FILE: page})
    return Report(folder / PAGE_FILE, [folder / name for name in plots], content.notes)
