"""What can be watched of a mixture's training besides its progress: log.csv, and TensorBoard's files where it is installed."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from modekit.files.write import write_file

LOG_FILE = "log.csv"
TENSORBOARD_FOLDER = "tensorboard"


def log_writers(folder: Path) -> list[TrainerCallback]:
    """Callbacks that write into `folder`."""
    if find_spec("tensorboard") is None:
        return [_LogFile()]
    from transformers.integrations import TensorBoardCallback

    callback = TensorBoardCallback()
    callback.logging_dir = str(folder / TENSORBOARD_FOLDER)  # whatever the environment says: they go to OUT/results
    return [callback, _LogFile()]


class _LogFile(TrainerCallback):  # type: ignore[misc]
    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            write_log(Path(args.output_dir) / LOG_FILE, state.log_history)


def write_log(path: Path, history: Sequence[Mapping[str, float]]) -> None:
    """One row per step that was logged; a column per figure."""
    rows: dict[int, dict[str, float]] = {}
    for entry in history:
        if "loss" in entry or "eval_loss" in entry:
            rows.setdefault(int(entry["step"]), {}).update(entry)
    skipped = {"epoch", "step", "eval_runtime"}
    named = sorted({key for row in rows.values() for key in row} - skipped)  # a state that was read back has another order
    columns = ["step", *sorted(named, key=lambda key: (key.startswith("eval_"), not key.startswith("loss")))]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "step": step} for step, row in sorted(rows.items()))
    write_file(path, text.getvalue().encode())
