"""What searches and trainings left in OUT/results: checked, and left out with a reason when it is of another mixture."""

from __future__ import annotations

import csv
import io
import math
import os
from dataclasses import dataclass
from pathlib import Path

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.evaluation.inspection.result import INSPECT_FILE, Inspection
from modekit.evaluation.results import Results
from modekit.evaluation.results_folder import of_another, read_or_say, results_path
from modekit.files.read import LARGE, read_json, read_text
from modekit.files.typed import Count, Number, as_kind, read_as
from modekit.search.results import SEARCH_FILE, TuneResults

TRAIN_FILE, CURVE_FILE = "train.json", "train.csv"


@dataclass(frozen=True)
class Curve:
    """train.csv: columns of numbers by step, None where nothing was logged."""

    steps: list[Count]
    columns: dict[str, list[Number | None]]


@dataclass(frozen=True)
class TrainingTables:
    """train.json of the last training: the table before and after, where there was text, and its curve."""

    results: Results | None
    curve: Curve | None


def find_inspection(checkpoint: Checkpoint, problems: list[str]) -> Inspection | None:
    """What `modekit inspect` found."""
    path = results_path(checkpoint, INSPECT_FILE)
    inspection = read_or_say(INSPECT_FILE, "modekit inspect", lambda: read_as(path, Inspection, LARGE), problems)
    if inspection is not None and (inspection.checkpoint != checkpoint.identity or inspection.experts != checkpoint.names):
        problems.append(of_another(INSPECT_FILE, "modekit inspect"))
        return None
    return inspection


def find_search(checkpoint: Checkpoint, problems: list[str]) -> TuneResults | None:
    """The search that this mixture came out of, when there was one."""
    path = results_path(checkpoint, SEARCH_FILE)
    if not os.path.lexists(path):
        return None
    search = read_or_say(SEARCH_FILE, "modekit tune", lambda: read_as(path, TuneResults, LARGE), problems)
    replaced = any(change.what == "replace" for change in checkpoint.record.history)
    if search is not None and (replaced or search.recipe_digest != checkpoint.record.recipe_digest):
        by = checkpoint.record.history[-1].what if checkpoint.record.history else "fit"
        problems.append(f"{SEARCH_FILE} is of another recipe or experts: `modekit {by}` has changed this mixture since")
        return None
    return search


def find_training(checkpoint: Checkpoint, problems: list[str]) -> TrainingTables | None:
    """Tables and curve of the last training; None when there was none, or its files are of another one."""
    path = results_path(checkpoint, TRAIN_FILE)
    if not checkpoint.record.training or not os.path.lexists(path):
        return None

    def read() -> TrainingTables | None:
        data = as_kind(read_json(path, LARGE), dict[str, object])
        if not {"training", "results"} <= data.keys():
            raise ValueError("it holds no training and results")
        if data["training"] != checkpoint.record.training[-1].model_dump(mode="json"):
            problems.append(f"{TRAIN_FILE} is of another training, so its curve is left out")
            return None
        table = data["results"]
        return TrainingTables(Results.from_data(table) if table else None, _curve(results_path(checkpoint, CURVE_FILE)))

    return read_or_say(TRAIN_FILE, "modekit train", read, problems)


def _curve(path: Path) -> Curve | None:
    """The log of a training; None when there is none that can be read."""
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(path, LARGE))))
        steps = [int(row["step"]) for row in rows]
        names = [name for name in rows[0] if name != "step"]
        columns = {name: [_number(row[name]) for row in rows] for name in names}
        return as_kind({"steps": steps, "columns": columns}, Curve)
    except (OSError, ValueError, KeyError, TypeError, IndexError, csv.Error):
        return None


def _number(cell: str) -> float | None:
    value = float(cell) if cell else None
    return value if value is not None and math.isfinite(value) else None
