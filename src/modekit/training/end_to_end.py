"""Training end to end: forward and back through the mixture, step by step, on as many processes as there are."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.errors import TrainingError
from modekit.loaded.engine import LoopSettings
from modekit.loaded.load import load_model
from modekit.loaded.shapes import mixture_of
from modekit.loaded.text_training import has_bfloat16_products
from modekit.processes import processes
from modekit.run import Run
from modekit.sources.config import words
from modekit.training.batches import Batches, plan_parts, steps_of_one_pass
from modekit.training.engine import run_trainer
from modekit.training.folder import TrainingOutcome
from modekit.training.moving import make_trainable, moving_of, names_of
from modekit.training.objective import DomainTeacher, Objective, make_teachers
from modekit.training.request import Request, has_no_router
from modekit.training.settings import DISTILLS, Group, TrainSettings
from modekit.training.texts import silent_domains


def train_end_to_end(request: Request, folder: Path, run: Run) -> TrainingOutcome:
    """Train; what is needed to go on after a kill is kept in `folder`. Raises TrainingError."""
    checkpoint, settings, corpora = request.checkpoint, request.settings, request.corpora
    mixture = _trainable(request, run)
    train_top_k, notes = _train_top_k(checkpoint, settings)
    silent = silent_domains(checkpoint, request.texts)
    notes += [f"no text of {', '.join(silent)}: nothing was trained on it"] if silent else []
    packed = packs(checkpoint)
    accumulate = settings.accumulate or (1 if packed else 2)
    steps = settings.steps or steps_of_one_pass(corpora, settings)
    per_step = accumulate * processes().count
    parts = plan_parts(corpora, settings, steps=steps, experts=len(checkpoint.names), parts=per_step, pack=packed)
    teachers = _teachers(request, folder, run) if DISTILLS & set(settings.losses) else []
    held_out = [text.held_out for text in request.texts]
    objective = Objective(mixture, checkpoint, settings, teachers=teachers, train_top_k=train_top_k, packed=packed)
    loop = loop_of(settings, steps, mixture.device, parts=accumulate)
    done = run_trainer(objective, Batches(corpora, parts), held_out, loop, folder, run)
    notes += [done.stopped] if done.stopped else []
    if not done.improved:
        notes.append("no state was better on held-out text than the start: nothing was changed")
    read = (draw for part in parts[: done.steps * per_step] for row in part.rows for draw in row)
    tokens = sum(corpora[draw.corpus].sequences[draw.sequence].size for draw in read)
    moving = sum(parameter.numel() for parameter in mixture.parameters() if parameter.requires_grad)
    return done.model_copy(update={"notes": notes, "parameters": moving, "tokens": tokens})


def _teachers(request: Request, folder: Path, run: Run) -> list[DomainTeacher | None]:
    if request.checkpoint.shape.family.pair:
        raise TrainingError(
            "models with an encoder are not distilled yet",
            where="losses",
            found=", ".join(DISTILLS & set(request.settings.losses)),
            remedy="train them on text alone",
        )
    return make_teachers(request.checkpoint, request.corpora, folder, request.teacher, run=run)


def _trainable(request: Request, run: Run) -> PreTrainedModel:
    """The mixture in memory, frozen but for what is to move."""
    checkpoint, settings = request.checkpoint, request.settings
    mixture = load_model(checkpoint.folder, run=run)
    loaded = mixture_of(mixture, checkpoint)
    loaded.prepare_training()
    but: tuple[Group, ...] = ("routers",) if settings.is_joint or checkpoint.record.carry is not None else ()
    make_trainable(loaded, names_of(moving_of(mixture, checkpoint), settings.what, but=but))
    if settings.checkpointing:
        mixture.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        mixture.enable_input_require_grads()
    return mixture


def _train_top_k(checkpoint: Checkpoint, settings: TrainSettings) -> tuple[int | None, list[str]]:
    """How many experts a token gets while training, and what has to be said about it. Raises TrainingError."""
    experts, own = len(checkpoint.names), checkpoint.record.recipe.top_k
    asked = experts if settings.train_top_k == 0 else settings.train_top_k
    if asked is not None and asked > experts:
        raise TrainingError(
            "there are fewer experts",
            where="train_top_k",
            found=asked,
            expected=f"at most {experts}, or 0 for all",
            remedy="lower it",
        )
    moves_routers = {"routers", "all"} & set(settings.what) and checkpoint.record.carry is None and not settings.is_joint
    alone = own == 1 and experts > 1 and not has_no_router(checkpoint) and bool(moves_routers)
    top_k = 2 if asked is None and alone else asked
    if "balance" in settings.losses and 1 < experts <= (top_k or own):
        raise TrainingError(
            "every token gets all experts, so that nothing is left to balance",
            where="losses: balance",
            found=f"{top_k or own} experts per token of {experts}",
            remedy=f"set train_top_k to {experts - 1}, or leave this out",
        )
    if top_k is None:
        return None, []
    why = ": a single expert's renormalised weight is 1, which gives its router no gradient" if asked is None else ""
    return top_k, [f"trained with {top_k} experts per token{why}; the checkpoint goes on to use {own}"]


def packs(checkpoint: Checkpoint) -> bool:
    """Whether rows hold several documents: not where something reads a row from its beginning."""
    running = any("linear" in str(kind) or "conv" in str(kind) for kind in words(checkpoint.config, "layer_types"))
    return not (checkpoint.shape.routing.reads_averages or running or checkpoint.shape.family.pair)


def loop_of(settings: TrainSettings, steps: int, device: torch.device, *, parts: int = 1) -> LoopSettings:
    """How a training goes; products are in bfloat16 as the settings say, else where an accelerator is faster with it."""
    bfloat16 = settings.precision == "bfloat16"
    if settings.precision is None:
        bfloat16 = device.type != "cpu" and has_bfloat16_products(device)
    every = min(steps, settings.evaluate_every or max(1, steps // 10))
    return LoopSettings(
        steps, parts, settings.warmup, settings.clip, settings.seed, bfloat16, every=every, patience=settings.patience
    )
