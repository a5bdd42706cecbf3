"""What can be watched of a training while it runs: progress, log.csv, and TensorBoard's files where that is installed."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from modekit.files.write import write_file
from modekit.run import DETAIL, Run
from modekit.training.trained_module import TrainedModule

LOG_FILE = "log.csv"
TENSORBOARD_FOLDER = "tensorboard"


def watchers(objective: TrainedModule, folder: Path, run: Run) -> list[TrainerCallback]:
    """Callbacks that write into `folder`, report progress, and tell what is trained where it goes on."""
    return [*_tensorboard(folder / TENSORBOARD_FOLDER), _Report(run), _GoesOn(objective)]


def _tensorboard(folder: Path) -> list[TrainerCallback]:
    if find_spec("tensorboard") is None:
        return []
    from transformers.integrations import TensorBoardCallback

    callback = TensorBoardCallback()
    callback.logging_dir = str(folder)  # whatever the environment says: the files go to OUT/results with the rest
    return [callback]


class _GoesOn(TrainerCallback):  # type: ignore[misc]
    """Tells what is trained of the steps before a kill."""

    def __init__(self, objective: TrainedModule) -> None:
        self._objective = objective

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._objective.go_on(state.log_history)


class _Report(TrainerCallback):  # type: ignore[misc]
    """Progress for the command line, and log.csv."""

    def __init__(self, run: Run) -> None:
        self._progress = run.progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._say(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._say(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any) -> None:
        if state.is_world_process_zero:
            write_log(Path(args.output_dir) / LOG_FILE, state.log_history)
        if logs is not None and "loss" in logs:
            self._say(state, f"{DETAIL}loss {logs['loss']:.3f}")

    def _say(self, state: Any, detail: str = "") -> None:
        if state.is_world_process_zero:
            self._progress(f"train{detail}", state.global_step, state.max_steps)


def write_log(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """One row per step that was logged; a column per figure."""
    rows: dict[int, dict[str, Any]] = {}
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
