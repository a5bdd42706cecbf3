"""One seed of the demo: base, experts, mixtures, and what each is worth."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from modekit.building.build import build
from modekit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from modekit.checkpoint.record import STATISTICS_FOLDER
from modekit.demo.kinds import REFITTED, Experts, Kind, PairSize
from modekit.demo.models import make_base, make_real_base
from modekit.demo.translation import make_pair_base, translate_once
from modekit.demo.workers import WorkerPool, WorkerTask
from modekit.errors import CheckpointError
from modekit.evaluation.evaluate import evaluate
from modekit.evaluation.results import Results
from modekit.evaluation.results_folder import RESULTS_FOLDER
from modekit.experts.specialize import specialize
from modekit.files.marker import INTERNAL
from modekit.files.output import is_there
from modekit.files.staging import staging
from modekit.files.write import carry_over, write_file
from modekit.planning.make import make_plan
from modekit.recipes.fits import FITS
from modekit.recipes.read import parse_recipe
from modekit.routing.refit import refit
from modekit.run import Progress, Run


def run_seed(folder: Path, texts: Mapping[str, Path], seed: int, kind: Kind, run: Run) -> dict[str, Results]:
    """Make what is not there yet, and return the table of every mixture by its name."""
    base = folder / "base"
    if is_there(base):
        pass
    elif kind.real:
        make_real_base(base, run)
    elif kind.translates:
        make_pair_base(base, texts, steps=kind.size.base_steps, seed=seed, run=run)
    else:
        make_base(base, dict(texts), steps=kind.size.base_steps, seed=seed, run=run)
    count, torch_threads = _side_by_side(kind.real)
    with WorkerPool(count, torch_threads, run.progress) as workers:
        for _ in workers.run(_trainings(folder, texts, seed, kind)):
            pass
        recipes = {name: _recipe(kind, says, texts) for name, says in kind.mixtures.items()}
        return _tables(folder, recipes, kind, workers)


def _side_by_side(real: bool) -> tuple[int, int]:
    """Processes, and torch's threads in each. The real demo's models fill the memory one at a time."""
    threads = torch.get_num_threads()
    return (1, threads) if real or threads == 1 or torch.cuda.is_available() else (2, threads // 2)


def _trainings(folder: Path, texts: Mapping[str, Path], seed: int, kind: Kind) -> Iterator[WorkerTask]:
    """The experts that are not there yet."""
    for place, name in enumerate(kind.domains):
        if not is_there(folder / name):
            training = kind.training.with_(seed=1000 * seed + place)
            yield WorkerTask(name, partial(_train_expert, folder, name, text=texts[name], what=kind.trains, training=training))


def _train_expert(folder: Path, name: str, *, text: Path, what: Experts, training: Any, progress: Progress) -> None:
    specialize(
        folder / "base",
        folder / name,
        [str(text)],
        root=folder,
        train=what,
        training=training,
        run=Run(progress=progress).about(name),
    )


def _tables(folder: Path, recipes: Mapping[str, dict[str, Any]], kind: Kind, workers: WorkerPool) -> dict[str, Results]:
    """Build and score every mixture, two at a time.

    The first is scored while others read text: all later ones take its rows of base and experts over. Those that read text are
    scored last, so that a process which is free before the reading ended has others to score.
    """
    first, *others = recipes
    routers = {name: recipes[name]["mixture"].get("router", {}) for name in others}
    reading = [name for name in others if name not in REFITTED and "tokens_per_domain" in routers[name]]
    found: dict[str, Results] = {}
    ended: set[str] = set()

    def tasks() -> Iterator[WorkerTask | None]:
        yield _scoring(folder, first, recipes[first], kind, None)
        for name in reading:
            yield WorkerTask(name, partial(_build_alone, folder, name, recipes[name]))
        for name in sorted(others, key=reading.__contains__):
            needed = {first, REFITTED.get(name, name)}.intersection([first, *reading])
            while not needed <= ended:
                yield None
            rows = [row for table in found.values() for row in table.rows]  # what these hold need not be scored again
            yield _scoring(folder, name, recipes[name], kind, dataclasses.replace(found[first], rows=rows))

    for name, table in workers.run(tasks()):
        ended.add(name)
        if isinstance(table, Results):
            found[name] = table
    return {name: found[name] for name in recipes}


def _scoring(folder: Path, name: str, recipe: dict[str, Any], kind: Kind, known: Results | None) -> WorkerTask:
    return WorkerTask(name, partial(_score, folder, name, recipe, kind=kind, known=known))


def _score(
    folder: Path, name: str, recipe: dict[str, Any], *, kind: Kind, known: Results | None, progress: Progress
) -> Results:
    checkpoint = _built(folder, name, recipe, progress)
    run = Run(progress=lambda stage, done, total: progress(f"{name}: {stage.partition(' ')[0].rstrip(':')}", done, total))
    results = evaluate(
        checkpoint, tokens_per_domain=kind.size.eval_tokens, sequence_length=kind.training.sequence_length, known=known, run=run
    )
    if isinstance(kind.size, PairSize):
        translate_once(checkpoint, kind.size.translated, run)
    return results


def _build_alone(folder: Path, name: str, recipe: dict[str, Any], *, progress: Progress) -> None:
    _built(folder, name, recipe, progress)


def _recipe(kind: Kind, says: dict[str, Any], texts: Mapping[str, Path]) -> dict[str, Any]:
    mixture = dict(says["mixture"])
    if mixture["method"] != "linear":
        router = dict(mixture.get("router", {}))
        tokens = kind.size.fit_tokens
        if "fit" in router and "tokens_per_domain" in FITS[router["fit"]].settings:
            router.update(
                tokens_per_domain=tokens, keep_tokens=min(tokens, 16_384), sequence_length=kind.training.sequence_length
            )
        mixture["router"] = router
    model = "adapter" if kind.trains == "lora" else "model"
    files = {name: f"../text/{texts[name].name}" for name in (*kind.domains, *kind.unseen)}
    # Nothing of a demo is chosen by the select split. Few pairs are held out: both splits of them are shown.
    shown = files if kind.translates else {name: files[name] for name in kind.unseen}
    return {
        "base_model": "./base",
        "experts": [{"name": domain, model: f"./{domain}", "text": files[domain]} for domain in kind.domains],
        "mixture": mixture,
        "output": says.get("output", {}),
        "eval": shown,
    }


def _built(folder: Path, name: str, recipe: dict[str, Any], progress: Progress) -> Checkpoint:
    """The mixture's checkpoint: the one that is there, another one's with its router fitted anew, or a new one."""
    out = folder_of_mixture(folder, name)
    write_file(out.with_suffix(".yaml"), yaml.safe_dump(recipe, sort_keys=False).encode())
    plan = make_plan(parse_recipe(recipe, where=name), folder)

    def report(stage: str, done: int, total: int) -> None:
        progress(f"{name}: {stage}", done, total)

    try:
        checkpoint = open_checkpoint(out)
        if checkpoint.record.recipe_digest == plan.recipe.digest():
            return checkpoint
    except CheckpointError:
        pass
    if name in REFITTED:
        return _refitted(folder_of_mixture(folder, REFITTED[name]), out, recipe["mixture"], report)
    return build(plan, out, overwrite=True, run=Run(progress=report))


def _refitted(source: Path, out: Path, mixture: dict[str, Any], progress: Progress) -> Checkpoint:
    """A copy of a mixture whose router is fitted anew from the statistics that came along."""
    with staging(out, f"copy of {source.name}", "checkpoint", sources=[source], replace="modekit's own") as stage:
        stage.areas = (STATISTICS_FOLDER,)
        carry_over(source, stage.folder, but=(RESULTS_FOLDER, *INTERNAL))
    return refit(open_checkpoint(out), mixture, run=Run(progress=progress))


def folder_of_mixture(folder: Path, name: str) -> Path:
    """Where a mixture of a seed lies."""
    return folder / name.replace(" ", "-")
