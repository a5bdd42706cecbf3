"""`modekit eval-tasks OUT`: what base, experts and mixture are worth on tasks of lm-evaluation-harness, run by its own HFLM.

OUT/results/tasks.json, tasks.md    scores with standard errors over items
OUT/results/tasks/                  the questions, as tasks that `lm_eval` itself can run
"""

from __future__ import annotations

import difflib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import refuse_pairs
from modekit.errors import ModekitError, SourceError, TextError, check_packages
from modekit.evaluation.domains import only_finite
from modekit.evaluation.results_folder import RESULTS_FOLDER, write_results
from modekit.evaluation.rows import RowJob, row_jobs
from modekit.evaluation.tables import MIXTURE
from modekit.evaluation.tasks.questions import GROUPS, Questions, make_questions
from modekit.evaluation.tasks.results import Estimate, TaskResults, TaskScores
from modekit.files.write import digest_of_data
from modekit.loaded.load import load_tokenizer
from modekit.recipes.strict import BASE
from modekit.run import QUIET, Run

if TYPE_CHECKING:
    from lm_eval.api.task import Task

FOLDER = "tasks"
_SEED = 1234  # of few-shot examples, as in the harness's own command
_BATCH = 16  # texts that are read side by side
_RESAMPLED = 1_000  # draws for errors of scores that are no means
_PREFERRED = ("acc_norm", "acc", "exact_match")  # of the metrics of a task that is not ours; else its first


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


def evaluate_tasks(checkpoint: Checkpoint, names: Sequence[str], settings: TaskSettings, run: Run = QUIET) -> TaskResults:
    """Run tasks and write OUT/results/tasks.json and tasks.md.

    `names`: tasks of lm-evaluation-harness, its own or the user's, or questions (`GROUPS`). Raises ModekitError when
    the extra is missing, a name unknown, or a task cannot be run; TextError without text; CheckpointError where the output of
    a model is not finite.
    """
    refuse_pairs(
        checkpoint,
        "tasks ask models that write a text on",
        remedy="score its pairs: `modekit eval OUT`, and `modekit eval-translation OUT` for BLEU and chrF",
    )
    if settings.folders and not settings.trusted:
        raise ModekitError(
            "task files can run code, and read any file",
            where="--include-path",
            found=", ".join(map(str, settings.folders)),
            remedy="read them, and give --trust-tasks if all of it may run",
        )
    run.progress("prepare tasks", 0, 1)  # the harness takes seconds to load, and its own tasks half a minute
    check_packages(("lm_eval.models.huggingface",), "pip install 'modekit[eval]'")
    jobs, notes = _jobs(checkpoint, settings.models, run)
    forms = {form for name in names for form in GROUPS.get(name, ())}
    questions, lacking = _written_questions(checkpoint, forms) if forms else ({}, [])
    notes += lacking
    folder = (checkpoint.folder / RESULTS_FOLDER / FOLDER).resolve()
    with _quiet():
        named = [name for name in names if name not in GROUPS]
        tasks = _harness_tasks(named, settings.folders, [each.config(folder) for each in questions.values()])
        if not tasks:
            raise TextError("no task is left to run", where="TASKS", found="; ".join(notes) or None, remedy="name another")
        tokenizer, scores = load_tokenizer(checkpoint.folder, run=run), dict[str, TaskScores]()
        for place, job in enumerate(jobs):
            run.progress(f"score {job.name}", place, len(jobs))
            for name, own in _scored(job, tokenizer, tasks, settings).items():
                rows = scores[name].rows if name in scores else {}
                scores[name] = replace(own, rows={**rows, **own.rows})
        run.progress("score", len(jobs), len(jobs))
    earlier = _rows_not_asked_for(checkpoint, settings.models)
    for name, own in scores.items():
        scores[name] = _complete(own, earlier.get((name, own.asked), {}), questions.get(name), checkpoint)
    results = TaskResults(scores, notes=notes, checkpoint=checkpoint.identity)
    results.write(checkpoint)
    return results


def _complete(
    found: TaskScores, earlier: Mapping[str, Estimate], written: Questions | None, checkpoint: Checkpoint
) -> TaskScores:
    """With the rows of models that were not asked for, in order, and with what is known of written questions."""
    rows = {**earlier, **found.rows}
    ordered = {model: rows[model] for model in (BASE, *checkpoint.names, MIXTURE) if model in rows}
    if written is None:
        return replace(found, rows=ordered)
    return replace(found, rows=ordered, form=written.form, domain=written.domain, unseen=written.unseen)


def _rows_not_asked_for(checkpoint: Checkpoint, models: Sequence[str]) -> dict[tuple[str, str], dict[str, Estimate]]:
    """Rows of other models in tasks.json of the checkpoint as it is, by task and what it asked; none where `models` are all."""
    known = TaskResults.written_here(checkpoint) if models else None
    if known is None or not known.belongs_to(checkpoint):
        return {}
    return {
        (name, scores.asked): {model: estimate for model, estimate in scores.rows.items() if model not in models}
        for name, scores in known.tasks.items()
    }


def _jobs(checkpoint: Checkpoint, models: Sequence[str], run: Run) -> tuple[list[RowJob], list[str]]:
    """Of the base, every expert that is not the base itself, and the mixture those that were asked for; why some are left out.

    Raises ModekitError for another name, and SourceError where none is left.
    """
    places = checkpoint.record.expert_sources
    known = [BASE, *(name for name, place in zip(checkpoint.names, places, strict=True) if place != 0), MIXTURE]
    for name in models:
        if name not in known:
            raise ModekitError(
                "unknown model", where="--models", found=name, expected=", ".join(known), remedy="write some of them"
            )
    jobs, left_out = row_jobs(checkpoint, run=run)
    jobs = [job for job in jobs if job.name in (models or known)]
    notes = [note for note in left_out if note.partition(" left out")[0] in (models or known)]
    if not jobs:
        raise SourceError(
            "none of the models that were asked for can be scored",
            where=str(checkpoint.folder),
            found="; ".join(notes),
            remedy="ask for the mixture as well, or put the models back",
        )
    return jobs, notes


def _written_questions(checkpoint: Checkpoint, forms: set[str]) -> tuple[dict[str, Questions], list[str]]:
    """Those of these forms by name of their task, and notes. All are written for `lm_eval`."""
    made, notes = make_questions(checkpoint)
    files = {f"{FOLDER}/{name}": content for each in made for name, content in each.files().items()}
    write_results(checkpoint, files, all_of=FOLDER)
    lacking = sorted(forms - {each.form for each in made})
    return {each.name: each for each in made if each.form in forms}, [
        *notes,
        *(f"no domain's text gives {form}" for form in lacking),
    ]


def _harness_tasks(names: Sequence[str], folders: Sequence[Path], configs: Sequence[Mapping[str, object]]) -> dict[str, Task]:
    """Tasks by name (tasks, groups, tags, with * and ?) from folders and the harness's own, and what task files would say."""
    from lm_eval.tasks import TaskManager

    paths = [str(folder) for folder in folders]
    manager = TaskManager(include_path=paths, include_defaults=False)
    if not all(manager.match_tasks([name]) for name in names):
        manager = TaskManager(include_path=paths)  # with its own: thousands of files
    for name in names:
        if not manager.match_tasks([name]):
            close = difflib.get_close_matches(name, [*GROUPS, *manager.all_tasks], 3)
            raise ModekitError(
                "unknown task",
                where="TASKS",
                found=name,
                expected=f"perhaps {', '.join(close)}" if close else None,
                remedy="see `lm_eval ls tasks`, or give the folder of your own tasks with --include-path",
            )
    tasks: dict[str, Task] = {}
    for wanted in [*dict.fromkeys(match for name in names for match in manager.match_tasks([name])), *configs]:
        with _explained([wanted] if isinstance(wanted, str) else []):
            tasks.update(manager.load([wanted])["tasks"])
    return tasks


def _scored(
    job: RowJob, tokenizer: PreTrainedTokenizerBase, tasks: Mapping[str, Task], settings: TaskSettings
) -> dict[str, TaskScores]:
    """A model's score of each task by the first of several filters.

    A router may decide by a whole text, and HFLM masks no pads, so that a model of ours reads likelihoods one text at a time.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    model = job.load()
    batch = 1 if hasattr(model.config, "modekit") else _BATCH
    for task in tasks.values():
        task.set_fewshot_seed(_SEED)  # the same examples for every model
    with _explained(tasks), only_finite(model):
        found: Any = evaluate(
            lm=HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch, softmax_dtype="float32"),
            task_dict={"tasks": dict(tasks), "groups": {}},
            limit=settings.limit,
            bootstrap_iters=_RESAMPLED,
            log_samples=False,
            confirm_run_unsafe_code=settings.trusted,
        )
        scores = {}
        for name, task in tasks.items():
            better, results = task.higher_is_better(), found["results"][name]
            metric = next(each for each in (*_PREFERRED, *better) if each in better)
            key = next(key for key in results if key.startswith(f"{metric},"))
            error = results.get(key.replace(",", "_stderr,", 1))
            estimate = Estimate(float(results[key]), float(error) if isinstance(error, float) else None)
            items = int(found["n-samples"][name]["effective"])
            scores[name] = TaskScores(metric, bool(better[metric]), items, {job.name: estimate}, asked=_asked(task))
        return scores


def _asked(task: Task) -> str:
    """Digest of what a model was asked, and of how its answers are judged."""
    requests = [repr((each.doc, each.args)) for each in task.instances]
    return digest_of_data([version("lm_eval"), repr(task.dump_config()), requests])


@contextmanager
def _explained(tasks: Sequence[str] | Mapping[str, object]) -> Iterator[None]:
    """While open, whatever goes wrong in the harness ends in TextError."""
    try:
        yield
    except ModekitError:
        raise
    except Exception as error:  # data sets, the hub, filters and metrics raise errors that share no base class
        raise TextError(
            "a task cannot be run",
            where=f"task {', '.join(tasks)[:200]}",
            found=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            remedy="run the tasks one at a time to see which. Its data set has to be on this machine or on a hub that can be "
            "reached (HF_HUB_OFFLINE); its text, answers and metrics have to fit together",
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """While open the harness logs, warns and draws nothing."""
    from tqdm import std

    logger, begin = logging.getLogger("lm_eval"), std.tqdm.__init__
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.CRITICAL)
        stack.callback(setattr, std.tqdm, "__init__", begin)
        std.tqdm.__init__ = lambda bar, *of, **settings: begin(bar, *of, **{**settings, "disable": True})
        yield
