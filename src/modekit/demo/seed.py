"""One seed of the demo: base, experts, mixtures, and what each is worth."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml

from modekit.building.build import build
from modekit.checkpoint.open import open_checkpoint
from modekit.demo.kinds import Experts, Kind
from modekit.demo.models import make_base, make_real_base
from modekit.demo.translation import make_pair_base, translate_once
from modekit.errors import CheckpointError, ModekitError
from modekit.evaluation.evaluate import evaluate
from modekit.evaluation.results import Results
from modekit.experts.specialize import specialize
from modekit.files.change import is_there
from modekit.files.write import write_file
from modekit.loaded.text_training import Training
from modekit.planning.make import make_plan
from modekit.recipes.fits import FITS
from modekit.recipes.read import parse_recipe
from modekit.run import QUIET, Run

T = TypeVar("T")


def run_seed(folder: Path, texts: Mapping[str, Path], seed: int, kind: Kind, run: Run) -> dict[str, Results]:
    """Make what is not there yet, and return the table of every mixture by its name.

    The first mixture is scored before the others, which take its rows of base and experts over.
    """
    base, steps = folder / "base", kind.size.base_steps
    if not is_there(base):
        if kind.real:
            make_real_base(base, run)
        else:
            (make_pair_base if kind.translates else make_base)(base, texts, steps=steps, seed=seed, run=run)
    trainings = {name: kind.size.training.with_(seed=1000 * seed + place) for place, name in enumerate(kind.domains)}
    missing = {name: training for name, training in trainings.items() if not is_there(folder / name)}
    recipes = {name: recipe_of(kind, says, texts) for name, says in kind.mixtures.items()}
    first = next(iter(recipes))
    with closing(Workers(*_side_by_side(kind.real), run)) as workers:
        experts = {name: (folder, name, texts[name], kind.trains, training) for name, training in missing.items()}
        workers.each("train experts", _train_expert, experts)
        workers.each("build", _build, {name: (folder, name, recipe) for name, recipe in recipes.items()})
        known = {first: _score(run.about(first), folder, first, kind, None)}  # its many models have all threads
        others = {name: (folder, name, kind, known[first]) for name in recipes if name != first}
        return {**known, **workers.each("score", _score, others)}


def _side_by_side(real: bool) -> tuple[int, int]:
    """Processes, and torch's threads in each. The real demo's models fill the memory one at a time."""
    threads = torch.get_num_threads()
    return (1, threads) if real or threads == 1 or torch.cuda.is_available() else (2, threads // 2)


class Workers:
    """`count` processes beside each other, each with its part of torch's threads; 1 is the calling process alone.

    Two models that train or are scored in a process each need less time than one after the other with two threads.
    """

    def __init__(self, count: int, torch_threads: int, run: Run) -> None:
        self._run, self._pool = run, None
        if count > 1:
            self._pool = ProcessPoolExecutor(count, get_context("spawn"), _start, (torch_threads,))

    def close(self) -> None:
        """End what has not begun, and wait for what has."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def each(self, stage: str, call: Callable[..., T], tasks: Mapping[str, tuple[Any, ...]]) -> dict[str, T]:
        """Name -> what the call gives for its arguments. Raises what a call raises, and ModekitError where a process ended."""
        if self._pool is None:
            return {name: call(self._run.about(name), *arguments) for name, arguments in tasks.items()}
        futures = {name: self._pool.submit(call, QUIET, *arguments) for name, arguments in tasks.items()}
        try:
            for done, future in enumerate(as_completed(futures.values()), 1):
                future.result()
                self._run.progress(stage, done, len(futures))
        except BrokenProcessPool:
            remedy = "see its message above; the same command continues from here"
            raise ModekitError("a process of the demo ended early", where=stage, remedy=remedy) from None
        return {name: future.result() for name, future in futures.items()}


def _start(torch_threads: int) -> None:
    """A worker begins. It ends with the demo, however that ends."""
    torch.set_num_threads(torch_threads)
    threading.Thread(target=_end_with_the_command, daemon=True).start()


def _end_with_the_command() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _train_expert(run: Run, folder: Path, name: str, text: Path, what: Experts, training: Training) -> None:
    specialize(folder / "base", folder / name, [str(text)], root=folder, train=what, training=training, run=run)


def _build(run: Run, folder: Path, name: str, recipe: dict[str, Any]) -> None:
    """The mixture's checkpoint, unless the one of this recipe is there."""
    out = folder_of_mixture(folder, name)
    write_file(out.with_suffix(".yaml"), yaml.safe_dump(recipe, sort_keys=False).encode())
    plan = make_plan(parse_recipe(recipe, where=name), folder)
    try:
        is_built = open_checkpoint(out).record.recipe_digest == plan.recipe.digest()
    except CheckpointError:
        is_built = False
    if not is_built:
        build(plan, out, overwrite=True, run=run)


def _score(run: Run, folder: Path, name: str, kind: Kind, known: Results | None) -> Results:
    checkpoint = open_checkpoint(folder_of_mixture(folder, name))
    size = kind.size
    results = evaluate(
        checkpoint, tokens_per_domain=size.eval_tokens, sequence_length=size.training.sequence_length, known=known, run=run
    )
    if kind.translates:
        translate_once(checkpoint, size.translated, run)
    return results


def recipe_of(kind: Kind, says: dict[str, Any], texts: Mapping[str, Path]) -> dict[str, Any]:
    """The recipe of a mixture, as it lies in the folder of a seed."""
    mixture, tokens = dict(says["mixture"]), kind.size.fit_tokens
    if mixture["method"] != "linear":
        router = dict(mixture.get("router", {}))
        if "fit" in router and "tokens_per_domain" in FITS[router["fit"]].settings:
            length = kind.size.training.sequence_length
            router.update(tokens_per_domain=tokens, keep_tokens=min(tokens, 16_384), sequence_length=length)
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


def folder_of_mixture(folder: Path, name: str) -> Path:
    """Where a mixture of a seed lies."""
    return folder / name.replace(" ", "-")
