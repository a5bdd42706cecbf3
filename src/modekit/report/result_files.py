"""What lies in OUT/results: read, checked, and left out with a reason when it is not this checkpoint's."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ConfigDict, Field, ValidationError, model_validator

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.evaluation.identity import belongs_to
from modekit.evaluation.inspection.result import INSPECT_FILE, Inspection
from modekit.evaluation.results import MOST_CELLS, Results, results_from_data
from modekit.evaluation.results_folder import RESULTS_FILE, RESULTS_FOLDER, read_results
from modekit.files.read import LARGE, UNREADABLE, read_json, read_text
from modekit.files.typed import Count, Data, Number, problem_in, shortened
from modekit.report.translation_file import Translations

TRAIN_FILE, CURVE_FILE = "train.json", "train.csv"
TASKS_FILE, CHAT_FILE, SEARCH_FILE, TRANSLATE_FILE = "tasks.json", "chat.json", "tune.json", "translate.json"

_Read = TypeVar("_Read")


class TaskRow(Data):
    """A model's result on a task, with the bounds of its interval."""

    value: Number
    low: Number | None = None
    high: Number | None = None


class Task(Data):
    """One task."""

    metric: str
    rows: dict[str, TaskRow]


class Tasks(Data):
    """tasks.json."""

    format: Literal[1]
    checkpoint: dict[str, str] | None = None
    tasks: dict[str, Task]
    notes: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _is_a_table(self) -> Tasks:
        if len({row for task in self.tasks.values() for row in task.rows}) * len(self.tasks) > MOST_CELLS:
            raise ValueError(f"a table of more than {MOST_CELLS:,} cells")
        return self


class ChatRow(Data):
    """Questions of one kind: how many, on which share the right expert leads, and how often each does."""

    name: str
    questions: Count
    at_prompt: Number | None
    after_answer: Number | None
    leaders: dict[str, Count]


class Chat(Data):
    """chat.json."""

    format: Literal[1]
    checkpoint: dict[str, str]
    system: str | None
    answer_tokens: Count
    rows: list[ChatRow] = Field(max_length=2**10)
    notes: list[str] = Field(default_factory=list)


class Reported(Data):
    """What a variant came to on text that chose nothing."""

    mean_loss: Number
    gap_closed: Number | None


class Variant(Data):
    """One candidate of a search."""

    name: str
    description: str
    status: Literal["scored", "dropped", "refused"]
    mean_loss: Number | None
    report: Reported | None
    active: Count
    native: bool
    best: bool
    pareto: bool


class Search(Data):
    """tune.json: candidates from the best to the worst."""

    format: Literal[1]
    checkpoint: dict[str, str]
    candidates: list[Variant] = Field(max_length=2**14)
    seconds: Number


class Curve(Data):
    """train.csv: columns of numbers by step, None where nothing was logged."""

    steps: list[Count]
    columns: dict[str, list[Number | None]]


class Trained(Data):
    """train.json: the last training and, where there was text, the table before and after."""

    results: Results | None = None
    curve: Curve | None = None

    model_config = ConfigDict(arbitrary_types_allowed=True)


_Asked = TypeVar("_Asked", Tasks, Chat, Translations)


def find_results(checkpoint: Checkpoint, problems: list[str]) -> Results | None:
    """The table of `modekit eval`; what is wrong with it goes to `problems`."""
    results = _read(RESULTS_FILE, "modekit eval", lambda: read_results(checkpoint), problems)
    if results is not None and not belongs_to(results, checkpoint):
        problems.append(_of_another(RESULTS_FILE, "modekit eval"))
        return None
    if results is not None and not results.domains:
        problems.append(f"{RESULTS_FILE} has no domain with an expert of its own")
    return results


def find_inspection(checkpoint: Checkpoint, problems: list[str]) -> Inspection | None:
    """What `modekit inspect` found."""
    inspection = _parse(checkpoint, INSPECT_FILE, "modekit inspect", Inspection.model_validate, problems)
    if inspection is None:
        return None
    if inspection.checkpoint != checkpoint.identity or inspection.experts != checkpoint.names:
        problems.append(_of_another(INSPECT_FILE, "modekit inspect"))
        return None
    return inspection


def find_tasks(checkpoint: Checkpoint, problems: list[str]) -> Tasks | None:
    """What the mixture is worth on tasks, when that was asked."""
    return _asked(checkpoint, TASKS_FILE, "modekit eval --tasks", Tasks, problems)


def find_chat(checkpoint: Checkpoint, problems: list[str]) -> Chat | None:
    """Who leads in chats, when that was asked."""
    return _asked(checkpoint, CHAT_FILE, "modekit eval --chat", Chat, problems)


def find_translations(checkpoint: Checkpoint, problems: list[str]) -> Translations | None:
    """What the mixture writes of held-out sources, when that was asked."""
    return _asked(checkpoint, TRANSLATE_FILE, "modekit eval --translate", Translations, problems)


def find_search(checkpoint: Checkpoint, problems: list[str]) -> Search | None:
    """The search that this mixture came out of, when there was one."""
    if not os.path.lexists(_path(checkpoint, SEARCH_FILE)):
        return None
    search = _parse(checkpoint, SEARCH_FILE, "modekit tune", Search.model_validate, problems)
    if search is not None and search.checkpoint.get("recipe_digest") != checkpoint.record.recipe_digest:
        problems.append(f"{SEARCH_FILE} is of another recipe: `modekit fit` has changed this mixture since")
        return None
    if search is not None and any(change.what == "replace" for change in checkpoint.record.history):
        problems.append(f"{SEARCH_FILE} is of other experts: `modekit replace` has changed this mixture since")
        return None
    return search


def find_training(checkpoint: Checkpoint, problems: list[str]) -> Trained | None:
    """Tables and curve of the last training; None when there was none, or its files are of another one."""
    if not checkpoint.record.training or not os.path.lexists(_path(checkpoint, TRAIN_FILE)):
        return None

    def parse(data: Any) -> Trained | None:
        if not isinstance(data, dict) or not {"training", "results"} <= data.keys():
            raise ValueError("it holds no training and results")
        if data["training"] != checkpoint.record.training[-1].model_dump(mode="json"):
            return None
        table = data["results"]
        return Trained(results=results_from_data(table) if table else None, curve=_curve(_path(checkpoint, CURVE_FILE)))

    before = len(problems)
    trained = _parse(checkpoint, TRAIN_FILE, "modekit train", parse, problems)
    if trained is None and len(problems) == before:
        problems.append(f"{TRAIN_FILE} is of another training, so its curve is left out")
    return trained


def _asked(checkpoint: Checkpoint, file: str, command: str, kind: type[_Asked], problems: list[str]) -> _Asked | None:
    """What a command left that not everybody calls; None, and no word of it, where nobody did."""
    if not os.path.lexists(_path(checkpoint, file)):
        return None
    found = _parse(checkpoint, file, command, kind.model_validate, problems)
    if found is not None and found.checkpoint not in (None, checkpoint.identity):
        problems.append(_of_another(file, command))
        return None
    return found


def _path(checkpoint: Checkpoint, file: str) -> Path:
    return checkpoint.folder / RESULTS_FOLDER / file


def _of_another(file: str, command: str) -> str:
    changed = "models, router, recipe, tokenizer or training changed since"
    return f"{file} is of another state of this mixture ({changed}): run `{command}` again"


def _parse(checkpoint: Checkpoint, file: str, command: str, parse: Callable[[Any], _Read], problems: list[str]) -> _Read | None:
    return _read(file, command, lambda: parse(read_json(_path(checkpoint, file), LARGE)), problems)


def _read(file: str, command: str, read: Callable[[], _Read], problems: list[str]) -> _Read | None:
    try:
        return read()
    except FileNotFoundError:
        problems.append(f"there is no {file}: run `{command}`")
    except ValidationError as error:
        problems.append(f"{file} is damaged or of another version ({problem_in(error)}): run `{command}`")
    except UNREADABLE as error:
        problems.append(f"{file} is damaged or of another version ({shortened(error)}): run `{command}`")
    return None


def _curve(path: Path) -> Curve | None:
    """The log of a training; None when there is none that can be read."""
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(path, LARGE))))
        steps = [int(row["step"]) for row in rows]
        names = [name for name in rows[0] if name != "step"]
        return Curve(steps=steps, columns={name: [_number(row[name]) for row in rows] for name in names})
    except (OSError, ValueError, KeyError, TypeError, IndexError, csv.Error):
        return None


def _number(cell: str) -> float | None:
    value = float(cell) if cell else None
    return value if value is not None and math.isfinite(value) else None
