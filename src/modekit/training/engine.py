"""The training loop: transformers' Trainer over the planned batches, whatever launcher and however many processes.

    OUT.training/checkpoint-N/    what moves, optimiser, schedule and random state after step N; `complete` is written last
    OUT.training/log.csv          loss, its parts, learning rate and held-out losses by step

Only what moves is kept in these folders. A state is worth what the held-out loss says: the mean over domains on the select
split.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.utils import logging

from modekit.errors import TrainingError
from modekit.evaluation.domains import Domain
from modekit.files.write import remove
from modekit.run import Run
from modekit.training.batches import Batches
from modekit.training.ended import Trained
from modekit.training.log import watchers
from modekit.training.resumed import check_resumed
from modekit.training.trained_module import TrainedModule
from modekit.training.trainer import COMPLETE, STATE_FILE, MixtureTrainer, NotFiniteError


@dataclass(frozen=True)
class Schedule:
    """How many steps there are, of how many parts each process makes one, and whether products are in bfloat16."""

    steps: int
    accumulate: int
    bfloat16: bool


@contextmanager
def _loudness_kept() -> Iterator[None]:
    """Afterwards transformers says as much as it did before; Trainer sets that for the whole process."""
    before = logging.get_verbosity()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@_loudness_kept()
def run_trainer(
    objective: TrainedModule, batches: Batches, select: Sequence[Domain], schedule: Schedule, folder: Path, run: Run
) -> Trained:
    """Train until the steps are done or the held-out loss stops falling, from the last complete state in `folder` on.

    Raises TrainingError when that state is damaged.
    """
    last = _goes_on_from(folder)
    judging = {"eval_strategy": "steps", "metric_for_best_model": "loss", "greater_is_better": False}
    arguments = _arguments(objective, schedule, folder, **judging, eval_on_start=last is None)
    failed: TrainingError | None = None
    trainer = MixtureTrainer(objective, batches, select, arguments, watchers(objective, folder, run), run)
    try:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    except NotFiniteError as error:
        failed = TrainingError(
            "the loss is not finite: training stopped",
            where=error.where,
            found=error.found,
            remedy="lower learning_rate or backbone_learning_rate, or leave this text out; the best state so far is kept",
        )
    return _trained(trainer.state, schedule.steps, failed, folder)


@_loudness_kept()
def run_all_steps(
    objective: TrainedModule, batches: Batches, schedule: Schedule, folder: Path, run: Run
) -> list[dict[str, float]]:
    """Train until the steps are done, from the last complete state in `folder` on, and judge none; the log of all steps.

    `objective` then holds what came of it. Raises TrainingError when that state is damaged, or a loss is not finite.
    """
    last = _goes_on_from(folder)
    arguments = _arguments(objective, schedule, folder, eval_strategy="no")
    trainer = MixtureTrainer(objective, batches, (), arguments, watchers(objective, folder, run), run)
    try:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    except NotFiniteError as error:
        raise TrainingError(
            "the loss is not finite: training stopped",
            where=error.where,
            found=error.found,
            remedy="lower the learning rate, or leave this text out",
        ) from None
    history: list[dict[str, float]] = trainer.state.log_history
    return history


def _goes_on_from(folder: Path) -> Path | None:
    """The last complete state, if there is one. Raises TrainingError when it is damaged."""
    last = _last_complete(folder)
    if last is not None:
        check_resumed(last)
    return last


def _trained(state: Any, steps: int, failed: TrainingError | None, folder: Path) -> Trained:
    """What Trainer's state says. Raises `failed` when not even the start could be judged."""
    before = _held_out(state, 0)
    if before is None:
        assert failed is not None
        raise failed
    best = state.best_metric if state.best_metric is not None else math.inf
    start = sum(before.values()) / len(before)
    if not best < start:
        return Trained(state.global_step, 0, before, before, _why(state, steps), failed)
    after = _held_out(state, state.best_global_step)
    assert after is not None
    return Trained(
        state.global_step,
        int(state.best_global_step),
        before,
        after,
        _why(state, steps),
        failed,
        folder / f"checkpoint-{int(state.best_global_step)}" / STATE_FILE,
    )


def _held_out(state: Any, step: int) -> dict[str, float] | None:
    """Held-out losses by domain as they were logged after a step."""
    for entry in state.log_history:
        if entry.get("step") == step and "eval_loss" in entry:
            return {
                key.removeprefix("eval_").removesuffix("_loss"): value
                for key, value in entry.items()
                if key.startswith("eval_") and key.endswith("_loss") and key != "eval_loss"
            }
    return None


def _why(state: Any, steps: int) -> str | None:
    return None if state.global_step >= steps else "the held-out loss no longer fell"


def _arguments(objective: TrainedModule, schedule: Schedule, folder: Path, **judging: Any) -> TrainingArguments:
    settings, steps = objective.settings, schedule.steps
    every = min(steps, settings.evaluate_every or max(1, steps // 10))
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=schedule.accumulate,
        max_grad_norm=settings.clip,
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        restore_callback_states_from_checkpoint=True,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=[],
        seed=settings.seed,
        bf16=schedule.bfloat16,
        use_cpu=not torch.cuda.is_available(),
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=objective.skips_parameters,
        log_level="error",
        **judging,
    )
    if arguments.n_gpu > 1:  # several devices without a launcher: Trainer would cut every part anew
        arguments._n_gpu = 1
    return arguments


def _last_complete(folder: Path) -> Path | None:
    """The newest whole state; halves that a kill left are removed."""
    numbered = (path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal())
    states = sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]))
    whole = [state for state in states if (state / COMPLETE).exists()]
    for state in states:
        if state not in whole:
            remove(state)
    return whole[-1] if whole else None
