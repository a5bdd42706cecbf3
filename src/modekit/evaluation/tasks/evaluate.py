"""`modekit eval-tasks OUT`: what base, experts and mixture are worth on tasks, each loaded once and freed before the next.

OUT/results/tasks.json, tasks.md    scores with standard errors over items
OUT/results/tasks/                  the questions, as tasks that `lm_eval` itself can run
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from modekit.checkpoint.checkpoint import Checkpoint, refuse_pairs
from modekit.checkpoint.sources import why_not
from modekit.errors import ModekitError, SourceError, check_packages
from modekit.evaluation.results_folder import RESULTS_FOLDER, write_results
from modekit.evaluation.tables import MIXTURE
from modekit.evaluation.tasks.harness import (
    Estimate,
    Metric,
    asked_of,
    folders_state,
    harness_task,
    named_tasks,
    quiet,
    run_tasks,
)
from modekit.evaluation.tasks.questions import GROUPS, Questions, make_questions
from modekit.evaluation.tasks.results import TaskResults, TaskScores
from modekit.loaded.experts import load_expert_source
from modekit.loaded.load import load_model, load_tokenizer
from modekit.recipes.strict import BASE
from modekit.run import QUIET, ProgressCount, Run

if TYPE_CHECKING:
    from lm_eval.api.task import Task

FOLDER = "tasks"


@dataclass(frozen=True)
class TaskSettings:
    """Which models answer what.

    Attributes:
        models: names of rows; all without any.
        folders: of task files of the user's own, which may run code: only with `trusted`.
        limit: items of a task at most.
    """

    models: Sequence[str] = ()
    folders: Sequence[Path] = ()
    trusted: bool = False
    limit: int | None = None

    def check(self) -> None:
        """Raise ModekitError for folders that are not there, or not trusted."""
        gone = [str(folder) for folder in self.folders if not folder.is_dir()]
        if gone:
            raise ModekitError(
                "the folder of tasks does not exist", where="--include-path", found=gone[0], remedy="correct the path"
            )
        if self.folders and not self.trusted:
            raise ModekitError(
                "task files can run code, and read any file",
                where="--include-path",
                found=", ".join(map(str, self.folders)),
                remedy="read them, and give --trust-tasks if all of it may run",
            )


@dataclass(frozen=True)
class TaskRun:
    """A task to run. `asked`: a digest of it; `groups`: what it is averaged with, separated by commas; `questions`: what it
    asks, None for a task by name.
    """

    harness: Task
    metric: Metric
    asked: str
    groups: str
    questions: Questions | None = None


def evaluate_tasks(
    checkpoint: Checkpoint, names: Sequence[str], settings: TaskSettings | None = None, run: Run = QUIET
) -> TaskResults:
    """Run tasks and write OUT/results/tasks.json and tasks.md.

    `names`: tasks of lm-evaluation-harness, its own or the user's, or questions (`GROUPS`). Raises ModekitError when
    the extra is missing, a name unknown, or a task cannot be run; TextError without text; CheckpointError where the output of
    a model is not finite.
    """
    settings = settings or TaskSettings()
    refuse_pairs(
        checkpoint,
        "tasks ask models that write a text on",
        option="",
        remedy="score its pairs: `modekit eval OUT`, and `modekit eval-translation OUT` for BLEU and chrF",
    )
    others = [name for name in names if name not in GROUPS]
    forms = list(dict.fromkeys(form for name in names for form in GROUPS.get(name, ())))
    settings.check()
    run.progress("prepare tasks", 0, 1)  # the harness takes seconds to load, and its own tasks half a minute
    check_packages(("lm_eval.models.huggingface",), "pip install 'modekit[eval]'")
    chosen = _chosen(checkpoint, settings.models)
    notes: list[str] = []
    with quiet():
        found = named_tasks(others, settings.folders, list(GROUPS)) if others else {}
        tasks = _question_tasks(checkpoint, forms, settings, notes) if forms else {}
        for name, made in found.items():
            asked, metric = asked_of(name, made, settings.limit)
            tasks[name] = TaskRun(made, metric, asked, metric.metric)
        scored = _run(checkpoint, tasks, chosen, settings, notes, run)
    results = TaskResults(_scores(tasks, scored, settings.folders), notes=notes, checkpoint=checkpoint.identity)
    results = results.with_earlier(checkpoint)
    results.write(checkpoint)
    return results


def _chosen(checkpoint: Checkpoint, models: Sequence[str]) -> list[str]:
    """Rows that were asked for, of the base, every expert that is not the base itself, and the mixture."""
    places = checkpoint.record.expert_sources
    known = [BASE, *(name for name, place in zip(checkpoint.names, places, strict=True) if place != 0), MIXTURE]
    for name in models:
        if name not in known:
            raise ModekitError(
                "unknown model", where="--models", found=name, expected=", ".join(known), remedy="write some of them"
            )
    return [name for name in known if not models or name in models]


def _load(checkpoint: Checkpoint, name: str, run: Run) -> PreTrainedModel | str:
    """The model of a row, or why there is none."""
    if name == MIXTURE:
        return load_model(checkpoint.folder, run=run)
    expert = None if name == BASE else checkpoint.names.index(name)
    return why_not(checkpoint, expert, run=run) or load_expert_source(checkpoint, expert, run=run)


def _question_tasks(
    checkpoint: Checkpoint, forms: Sequence[str], settings: TaskSettings, notes: list[str]
) -> dict[str, TaskRun]:
    made, said = make_questions(checkpoint)
    notes += said
    folder = checkpoint.folder / RESULTS_FOLDER / FOLDER
    files = {f"{FOLDER}/{name}": content for each in made for name, content in each.files().items()}
    write_results(checkpoint, files, all_of=FOLDER)
    tasks = {}
    for questions in made:
        if questions.form in forms:
            task = harness_task(questions.config(folder.resolve()))
            asked, metric = asked_of(questions.name, task, settings.limit)
            # All are one mean, too: accuracies of the same number of choices.
            tasks[questions.name] = TaskRun(task, metric, asked, f"{questions.form},questions", questions)
    for form in forms:
        if not any(questions.form == form for questions in made):
            notes.append(f"no domain's text gives {form}")
    return tasks


def _run(
    checkpoint: Checkpoint,
    tasks: Mapping[str, TaskRun],
    models: Sequence[str],
    settings: TaskSettings,
    notes: list[str],
    run: Run,
) -> dict[str, dict[str, Estimate]]:
    """Model -> task -> score. One model is in memory at a time."""
    tokenizer = load_tokenizer(checkpoint.folder, run=run)
    asked = {name: (task.harness, task.metric.metric) for name, task in tasks.items()}
    each = sum(len(task.instances) for task, _ in asked.values())
    work = ProgressCount(run, each * len(models))
    scored: dict[str, dict[str, Estimate]] = {}
    for place, model in enumerate(models):
        advance = partial(work.advance, f"score {model}")
        advance(0)  # what is left is said while the model loads
        loaded = _load(checkpoint, model, run)
        if isinstance(loaded, str):
            notes.append(f"{model} left out: {loaded}")
            continue
        scored[model] = run_tasks(loaded, tokenizer, asked, limit=settings.limit, trusted=settings.trusted, advance=advance)
        advance((place + 1) * each - work.done)  # what was asked twice is read once
        del loaded
    if not scored:
        raise SourceError(
            "none of the models that were asked for can be scored",
            where=str(checkpoint.folder),
            found="; ".join(notes),
            remedy="ask for the mixture as well, or put the models back",
        )
    return scored


def _scores(
    tasks: Mapping[str, TaskRun], scored: Mapping[str, Mapping[str, Estimate]], folders: Sequence[Path]
) -> dict[str, TaskScores]:
    entries = {}
    paths = [str(folder.resolve()) for folder in folders]
    for name, task in tasks.items():
        own = paths if task.questions is None else []
        entries[name] = TaskScores(
            **vars(task.metric),
            items=len({instance.doc_id for instance in task.harness.instances}),
            rows={model: found[name] for model, found in scored.items()},
            groups=task.groups,
            asked=task.asked,
            domain=None if task.questions is None else task.questions.domain,
            unseen=task.questions is not None and task.questions.unseen,
            folders=own,
            state=folders_state(own),
        )
    return entries
