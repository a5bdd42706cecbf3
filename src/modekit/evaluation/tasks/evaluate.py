"""`modekit eval-tasks OUT`: what base, experts and mixture are worth on tasks, each loaded once and freed before the next.

OUT/results/tasks.json, tasks.md    scores with 95 % intervals, and the mixture's differences, paired over items
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
from modekit.evaluation.tasks.files import GROUPS, task_config, task_files, tasks_of
from modekit.evaluation.tasks.harness import (
    Metric,
    Scored,
    build_requests,
    harness_task,
    metrics_of,
    named_tasks,
    quiet,
    run_tasks,
)
from modekit.evaluation.tasks.intervals import Bootstrap, ItemSums, average, bleu_sample, differences, draw, mean_sample, rows
from modekit.evaluation.tasks.questions import make_questions
from modekit.evaluation.tasks.results import MIXTURE, TaskResults, TaskScores
from modekit.loaded.experts import load_expert_source
from modekit.loaded.load import load_model, load_tokenizer
from modekit.recipes.strict import BASE
from modekit.run import QUIET, ProgressCount, Run

if TYPE_CHECKING:
    from lm_eval.api.task import Task

FOLDER = "tasks"
_FOR = {"--include-path": "tasks by name", "--seen": "questions", "--seed": "questions"}


@dataclass(frozen=True)
class TaskRun:
    """A task to run. `group`: what it is averaged with; `domain`: whose questions it asks, None for a task by name."""

    name: str
    harness: Task
    metrics: Sequence[Metric]
    group: str | None
    domain: str | None
    unseen: bool


def evaluate_tasks(
    checkpoint: Checkpoint,
    names: Sequence[str],
    *,
    models: Sequence[str] = (),
    folders: Sequence[Path] = (),
    limit: int | None = None,
    seen: Sequence[str] = (),
    seed: int = 0,
    run: Run = QUIET,
) -> TaskResults:
    """Run tasks and write OUT/results/tasks.json and tasks.md.

    Args:
        names: tasks of lm-evaluation-harness, its own or from `folders`, or questions (see `files.GROUPS`).
        seen: text that the base model was trained on, whose terms are no questions.
        seed: of the questions.

    Raises ModekitError when the extra is missing, a name unknown, or a task cannot be run; TextError without text.
    """
    refuse_pairs(
        checkpoint,
        "tasks ask models that write a text on",
        option="",
        remedy="score its pairs: `modekit eval OUT`, and `modekit eval-translation OUT` for BLEU and chrF",
    )
    others = [name for name in names if name not in GROUPS]
    forms = list(dict.fromkeys(form for name in names for form in GROUPS.get(name, ())))
    for where, said, needed in (("--include-path", folders, others), ("--seen", seen, forms), ("--seed", seed, forms)):
        if said and not needed:
            raise ModekitError(
                "the setting has no effect", where=where, found=said, remedy=f"remove it: no {_FOR[where]} are asked for"
            )
    run.progress("prepare tasks", 0, 1)  # the harness takes seconds to load, and its own tasks half a minute
    check_packages(("lm_eval.models.huggingface", "rouge_score.rouge_scorer", "sacrebleu"), "pip install 'modekit[eval]'")
    chosen = _chosen(checkpoint, models)
    notes: list[str] = []
    with quiet(run.trust_remote_code):
        found = named_tasks(others, folders, trusted=run.trust_remote_code, others=list(GROUPS)) if others else {}
        tasks = _question_tasks(checkpoint, forms, seen, seed, limit, notes)
        for name, made in found.items():
            build_requests(name, made, limit)
            tasks.append(TaskRun(name, made, metrics_of(made, limit, every=False), None, None, False))
        scored = _run(checkpoint, tasks, chosen, limit, notes, run)
    results = _results(tasks, scored, notes, checkpoint).with_earlier(checkpoint)
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
    checkpoint: Checkpoint, forms: Sequence[str], seen: Sequence[str], seed: int, limit: int | None, notes: list[str]
) -> list[TaskRun]:
    if not forms:
        return []
    from modekit.evaluation.tasks.scores import process_results

    made, said = make_questions(checkpoint, seen=seen, seed=seed)
    notes += said
    folder = checkpoint.folder / RESULTS_FOLDER / FOLDER
    write_results(checkpoint, {f"{FOLDER}/{name}": content for name, content in task_files(made).items()}, all_of=FOLDER)
    tasks = []
    for name, (form, questions) in tasks_of(forms, made).items():
        own = {"process_results": process_results} if form == "generation" else {}
        task = harness_task({**task_config(form, questions, folder.resolve()), **own})
        build_requests(name, task, limit)
        tasks.append(TaskRun(name, task, metrics_of(task, None, every=True), form, questions.domain, questions.unseen))
    for form in forms:
        if form not in {task.group for task in tasks}:
            notes.append(f"no domain's text gives {form.replace('_plain', '')}")
    return tasks


def _run(
    checkpoint: Checkpoint,
    tasks: Sequence[TaskRun],
    models: Sequence[str],
    limit: int | None,
    notes: list[str],
    run: Run,
) -> dict[str, dict[str, Scored]]:
    """Model -> task -> its items. One model is in memory at a time."""
    tokenizer = load_tokenizer(checkpoint.folder, run=run)
    work = ProgressCount(run, sum(len(task.harness.instances) for task in tasks) * len(models))
    scored: dict[str, dict[str, Scored]] = {}
    for model in models:
        advance = partial(work.advance, f"score {model}")
        advance(0)  # what is left is said while the model loads
        loaded = _load(checkpoint, model, run)
        if isinstance(loaded, str):
            notes.append(f"{model} left out: {loaded}")
            continue
        scored[model] = run_tasks(
            loaded,
            tokenizer,
            {task.name: task.harness for task in tasks},
            limit=limit,
            trusted=run.trust_remote_code,
            advance=advance,
        )
        del loaded
    if not scored:
        raise SourceError(
            "none of the models that were asked for can be scored",
            where=str(checkpoint.folder),
            found="; ".join(notes),
            remedy="ask for the mixture as well, or put the models back",
        )
    return scored


def _results(
    tasks: Sequence[TaskRun], scored: Mapping[str, Mapping[str, Scored]], notes: Sequence[str], checkpoint: Checkpoint
) -> TaskResults:
    entries: dict[str, TaskScores] = {}
    members: dict[str, dict[str, Bootstrap]] = {}
    for task in tasks:
        of_task = {model: found[task.name] for model, found in scored.items()}
        items = len(next(iter(of_task.values())).items)
        for place, metric in enumerate(task.metrics):
            name = task.name if place == 0 else f"{task.name}:{metric.name}"
            drawn = _drawn(task, metric.name, of_task)
            table = rows(drawn), differences(drawn, MIXTURE)
            entries[name] = TaskScores(
                metric.name, metric.higher_is_better, metric.chance, items, *table, task.domain, task.unseen
            )
            group = metric.name if task.group is None else task.group if place == 0 else f"{task.group}:{metric.name}"
            # The questions are one mean, too: accuracies of the same number of choices, whatever their form.
            for each in [group, *(["questions"] if task.group in GROUPS["questions"] else [])] if not task.unseen else []:
                members.setdefault(each, {})[name] = drawn
    macro = {group: _mean(entries, drawn) for group, drawn in members.items() if len(drawn) > 1}
    return TaskResults(entries, macro, list(notes), checkpoint=checkpoint.identity)


def _mean(entries: Mapping[str, TaskScores], drawn: Mapping[str, Bootstrap]) -> TaskScores:
    """Over the tasks that were drawn."""
    tasks, mean = [entries[name] for name in drawn], average(list(drawn.values()))
    metrics = {task.metric for task in tasks}
    chances = [task.chance for task in tasks if task.chance is not None]
    return TaskScores(
        metrics.pop() if len(metrics) == 1 else "accuracy",
        tasks[0].higher_is_better,
        sum(chances) / len(chances) if len(chances) == len(tasks) else None,
        sum(task.items for task in tasks),
        rows(mean),
        differences(mean, MIXTURE),
        tasks=list(drawn),
    )


def _drawn(task: TaskRun, metric: str, of_task: Mapping[str, Scored]) -> Bootstrap:
    """Of a metric that is no mean of its items, and not corpus BLEU, the harness's value without draws."""
    samples: dict[str, ItemSums] = {}
    for model, scored in of_task.items():
        values = [item[metric] for item in scored.items if metric in item]
        sample: ItemSums | None = None
        if metric == "bleu" and values and isinstance(values[0], tuple):
            sample = bleu_sample(values)
        elif len(values) == len(scored.items) and all(isinstance(value, (int, float)) for value in values):
            sample = mean_sample([float(value) for value in values])
        if sample is None or abs(sample.value - scored.totals[metric]) > 1e-6 * max(1.0, abs(sample.value)):
            return Bootstrap({name: each.totals[metric] for name, each in of_task.items()}, dict.fromkeys(of_task))
        samples[model] = sample
    items = next(iter(of_task.values())).items
    clusters = [item["doc"].get("document") if task.group else item["doc_id"] for item in items]
    return draw(samples, clusters, task.name)
