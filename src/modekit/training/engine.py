"""The training loop: transformers' Trainer over the planned batches, whatever launcher and however many processes.

    OUT.training/checkpoint-N/    what moves, optimiser, schedule and random state after step N; `complete` is written last
    OUT.training/log.csv          loss, its parts, learning rate and held-out losses by step

Only what moves is kept in these folders. A state is worth what the held-out loss says: the mean over domains on the select
split.
"""

from __future__ import annotations

import csv
import io
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from modekit.checkpoint.staging import write_atomically
from modekit.errors import TrainingError
from modekit.evaluation.domains import Domain
from modekit.evaluation.loss import tokens_per_pass
from modekit.progress import Progress
from modekit.text.sequences import make_batches
from modekit.training.batches import Batches
from modekit.training.objective import Objective
from modekit.training.settings import TrainSettings

COMPLETE = "complete"
LOG_FILE = "log.csv"
_STATE_FILE = "model.safetensors"  # the name that Trainer looks for


@dataclass(frozen=True)
class Trained:
    """How a training ended: held-out losses at its start and at its best state.

    `best` is the file with what moved as it was in the best state, by its names in the model; None when no state was better
    than the start. `stopped` says why it ended before its last step, if it did; `failed` holds the error that the user should
    see.
    """

    steps: int
    best_step: int
    before: Mapping[str, float]
    after: Mapping[str, float]
    stopped: str | None
    failed: TrainingError | None = None
    best: Path | None = None


def run_trainer(
    objective: Objective,
    moving: Sequence[str],
    batches: Batches,
    select: Sequence[Domain],
    settings: TrainSettings,
    folder: Path,
    *,
    steps: int,
    accumulate: int,
    bfloat16: bool,
    progress: Progress,
) -> Trained:
    """Train until the steps are done or the held-out loss stops falling.

    `moving` names the parameters of the mixture that have gradients. Goes on from the last complete state in `folder`.
    """
    every = min(steps, settings.evaluate_every or max(1, steps // 10))
    last = _last_complete(folder)
    arguments = _arguments(
        settings,
        folder,
        steps=steps,
        accumulate=accumulate,
        every=every,
        bfloat16=bfloat16,
        from_start=last is None,
        unused=bool(objective.skips_parameters),
    )
    trainer = _MixtureTrainer(objective, moving, batches, select, settings, arguments, progress)
    failed: TrainingError | None = None
    try:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    except _NotFiniteError as error:
        failed = TrainingError(
            "the loss is not finite: training stopped", where=error.where, found=error.found,
            remedy="lower learning_rate or backbone_learning_rate, or leave this text out; the best state so far is kept",
        )  # fmt: skip
    state = trainer.state
    before = _held_out(state, 0)
    if before is None:  # not even the start could be judged
        assert failed is not None
        raise failed
    best = state.best_metric if state.best_metric is not None else math.inf
    start = sum(before.values()) / len(before)
    if not best < start:
        return Trained(state.global_step, 0, before, before, _why(state, steps), failed)
    after = _held_out(state, state.best_global_step)
    assert after is not None
    return Trained(
        state.global_step, int(state.best_global_step), before, after, _why(state, steps), failed,
        Path(state.best_model_checkpoint) / _STATE_FILE,
    )  # fmt: skip


def _held_out(state: Any, step: int) -> dict[str, float] | None:
    """Held-out losses by domain as they were logged after a step."""
    for entry in state.log_history:
        if entry.get("step") == step and "eval_loss" in entry:
            return {key.removeprefix("eval_").removesuffix("_loss"): value for key, value in entry.items()
                    if key.startswith("eval_") and key.endswith("_loss") and key != "eval_loss"}  # fmt: skip
    return None


def _why(state: Any, steps: int) -> str | None:
    return None if state.global_step >= steps else "the held-out loss no longer fell"


def _arguments(
    settings: TrainSettings,
    folder: Path,
    *,
    steps: int,
    accumulate: int,
    every: int,
    bfloat16: bool,
    from_start: bool,
    unused: bool,
) -> TrainingArguments:
    logs = ["tensorboard"] if find_spec("tensorboard") is not None else []
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=1, gradient_accumulation_steps=accumulate,
        max_grad_norm=settings.clip, eval_strategy="steps", eval_steps=every, save_strategy="steps", save_steps=every,
        save_total_limit=2, metric_for_best_model="loss", greater_is_better=False,
        restore_callback_states_from_checkpoint=True, logging_steps=1, logging_nan_inf_filter=False, report_to=logs,
        disable_tqdm=True, remove_unused_columns=False, label_names=[], seed=settings.seed, eval_on_start=from_start,
        bf16=bfloat16,
        use_cpu=not torch.cuda.is_available(), dataloader_num_workers=0, dataloader_pin_memory=False,
        ddp_find_unused_parameters=unused, log_level="error",
    )  # fmt: skip
    if arguments.n_gpu > 1:  # several devices without a launcher: Trainer would cut every part anew
        arguments._n_gpu = 1
    return arguments


class _NotFiniteError(Exception):
    def __init__(self, where: str, found: str) -> None:
        self.where = where
        self.found = found
        super().__init__(where)


class _MixtureTrainer(Trainer):  # type: ignore[misc]
    """Reads the batches in their order, keeps only what moves, and judges states by the mean held-out loss."""

    def __init__(
        self, objective: Objective, moving: Sequence[str], batches: Batches, select: Sequence[Domain],
        settings: TrainSettings, arguments: TrainingArguments, progress: Progress,
    ) -> None:  # fmt: skip
        super().__init__(
            model=objective, args=arguments, train_dataset=batches, eval_dataset=batches, data_collator=lambda items: items[0],
            callbacks=[EarlyStoppingCallback(settings.patience), _Report(progress)],
        )  # fmt: skip
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False  # the loss is per step, not per part: `compute_loss` sees to it
        self._objective = objective
        self._moving = {f"mixture.{name}" for name in moving}
        self._batches = batches
        self._select = select
        self._settings = settings
        if self.is_fsdp_enabled:  # one whole state, so that it can be written as a checkpoint
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")

    def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler[int]:
        return torch.utils.data.SequentialSampler(self._batches)

    optimizer: Any
    control: Any

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW with a rate of their own for routers; only what moves is in it."""
        if self.optimizer is None:
            routers: list[Any] = []
            others: list[Any] = []
            gates = {f"mixture.{name}" for name in self._objective.gate_names}
            for name, parameter in (model or self.model).named_parameters():
                if parameter.requires_grad:
                    (routers if name in gates else others).append(parameter)
            groups = [
                {"params": routers, "lr": self._settings.learning_rate, "weight_decay": 0.0},
                {
                    "params": others, "lr": self._settings.backbone_learning_rate,
                    "weight_decay": self._settings.weight_decay,
                },
            ]  # fmt: skip
            self.optimizer = torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.95))
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Linear up over the warm-up, then linear to zero after the last step."""
        warm = max(1, math.ceil(num_training_steps * self._settings.warmup))
        rest = max(1, num_training_steps - warm)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer, lambda step: min((step + 1) / warm, max(0.0, 1.0 - (step - warm) / rest))
        )
        return self.lr_scheduler

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The part's share of the step's mean loss. Trainer divides by the parts, DDP by the processes."""
        factor = float(self.args.gradient_accumulation_steps * self.args.world_size)
        loss = model(factor=factor, **inputs)["loss"]
        finite = self.accelerator.reduce(torch.isfinite(loss.detach()).float(), reduction="mean") == 1.0
        if not finite:
            part = self.state.global_step * self.args.gradient_accumulation_steps * self.args.world_size
            parts = range(part, min(len(self._batches), part + int(factor)))
            where = f"step {self.state.global_step + 1}: {'; '.join(self._batches.describe(number) for number in parts)}"
            raise _NotFiniteError(where, f"loss {float(loss.detach())}")
        return (loss, {"loss": loss}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's logs with the parts of the loss."""
        if "loss" in logs:
            logs |= self._objective.drain()
        super().log(logs, start_time)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean held-out loss of every domain (select split), and the mean over domains."""
        losses = self.select_losses()
        metrics = {
            "eval_loss": sum(losses.values()) / len(losses),
            **{f"eval_{name}_loss": loss for name, loss in losses.items()},
        }
        if not math.isfinite(metrics["eval_loss"]):
            raise _NotFiniteError(f"held-out text after step {self.state.global_step}", f"loss {metrics['eval_loss']}")
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def select_losses(self) -> dict[str, float]:
        """Loss per domain under the routing that the checkpoint's config says."""
        self.model.eval()
        with torch.no_grad(), self._objective.as_configured():
            return {text.name: self._score(text) for text in self._select}

    def _score(self, text: Domain) -> float:
        total = 0.0
        for batch in make_batches(text.sequences, tokens=tokens_per_pass(self._objective.config)):
            item = {"input_ids": batch.input_ids.to(self.args.device), "real": batch.mask.to(self.args.device)}
            total += float(self.model(score=True, **item)["loss"])
        return total / text.scored_tokens

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Only what moves."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        state = state_dict if state_dict is not None else dict(self.model.named_parameters())
        moved = {name: state[name].detach().contiguous().cpu() for name in sorted(self._moving)}
        save_file(moved, folder / _STATE_FILE)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            (Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}" / COMPLETE).touch()

    def _issue_warnings_after_load(self, _result: Any) -> None:
        """Nothing: what does not move is not in the file."""


class _Report(TrainerCallback):  # type: ignore[misc]
    """Progress for the command line, and log.csv."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self._progress("train", state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            write_log(Path(args.output_dir) / LOG_FILE, state.log_history)


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
    write_atomically(path, text.getvalue().encode())


def _last_complete(folder: Path) -> Path | None:
    """The newest whole state; halves that a kill left are removed."""
    states = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    whole = [state for state in states if (state / COMPLETE).exists()]
    for state in states:
        if state not in whole:
            shutil.rmtree(state, ignore_errors=True)
    return whole[-1] if whole else None
