"""The training loop of a mixture: loaded/engine.py's, with states that are judged.

    OUT.training/checkpoint-N/    a state (loaded/states.py)
    OUT.training/log.csv          loss, its parts, learning rate and held-out losses by step
    OUT.training/tensorboard/     the same for TensorBoard, where it is installed

A state is worth what the held-out loss says: the mean over domains on the select split.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import EarlyStoppingCallback, PreTrainedModel, TrainerCallback, TrainerState, TrainingArguments

from modekit.evaluation.domains import Domain
from modekit.evaluation.loss import tokens_per_pass
from modekit.files.write import write_file
from modekit.loaded.engine import (
    BETAS,
    LoopSettings,
    ModuleTrainer,
    NotFiniteError,
    TrainedModule,
    arguments_of,
)
from modekit.loaded.load import verbosity_kept
from modekit.loaded.passes import losses_of
from modekit.loaded.states import state_to_resume
from modekit.processes import processes
from modekit.run import Run
from modekit.text.sequences import Batch, make_batches
from modekit.training.batches import Batches
from modekit.training.folder import TrainingOutcome
from modekit.training.settings import TrainSettings


class JudgedModule(TrainedModule):
    """A model whose losses are summed over a batch's tokens, and that scores held-out text.

    `gate_names`: parameters of routers, which have a learning rate of their own.
    """

    def __init__(self, model: PreTrainedModel, settings: TrainSettings) -> None:
        super().__init__(model)
        self.settings = settings
        self.gate_names: list[str] = []
        self._sums: dict[str, float] = {}

    def losses(self, batch: Batch, item: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Every loss of a batch from `Batches`, summed over its tokens, by name."""
        raise NotImplementedError

    def weights(self, losses: Mapping[str, torch.Tensor]) -> Mapping[str, float]:
        """How much each of these losses counts."""
        raise NotImplementedError

    def forward(self, factor: float = 1.0, score: bool = False, **item: torch.Tensor) -> dict[str, torch.Tensor]:
        """The loss of a batch from `Batches`: its share of the step's, per predicted token of the step, times `factor`.

        With `score`, the sum of -log p over the predicted tokens of a padded batch (input_ids, real, target of pairs, silent).
        """
        batch = Batch(item["input_ids"], item["real"], (), item.get("target"), item.get("silent"))
        if score:
            return {"loss": losses_of(self.model, batch).sum()}
        losses = self.losses(batch, item)
        weights, targets = self.weights(losses), item["targets"].to(next(iter(losses.values())).device)
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value.detach() / targets)
        parts = [weights[name] * value for name, value in losses.items() if weights[name]]
        total = torch.stack(parts).sum() if parts else 0.0 * torch.stack([*losses.values()]).sum()
        return {"loss": total * (factor / targets)}

    def optimizer(self, named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """AdamW with a rate of their own for routers, whose weights do not decay."""
        gates, settings = {f"model.{name}" for name in self.gate_names}, self.settings
        routers: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in named:
            if parameter.requires_grad:
                (routers if name in gates else others).append(parameter)
        groups = [
            {"params": routers, "lr": settings.learning_rate, "weight_decay": 0.0},
            {"params": others, "lr": settings.backbone_learning_rate, "weight_decay": settings.weight_decay},
        ]
        return torch.optim.AdamW([group for group in groups if group["params"]], betas=BETAS)

    def drain(self) -> dict[str, float]:
        """Every loss of the last step, of all processes' parts, per predicted token of the step."""
        summed = processes().add_up(torch.tensor([*self._sums.values()])).tolist()
        drained, self._sums = {f"loss_{name}": value for name, value in zip(self._sums, summed, strict=True)}, {}
        return drained


def run_trainer(
    objective: JudgedModule, batches: Batches, select: Sequence[Domain], loop: LoopSettings, folder: Path, run: Run
) -> TrainingOutcome:
    """Train until the steps are done or the held-out loss stops falling, from the last whole state in `folder` on.

    Raises TrainingError when that state is damaged.
    """
    with verbosity_kept():
        last = state_to_resume(folder)
        every = min(loop.steps, objective.settings.evaluate_every or max(1, loop.steps // 10))
        arguments = arguments_of(
            objective,
            loop,
            folder,
            eval_strategy="steps",
            eval_steps=every,
            save_strategy="steps",
            save_steps=every,
            metric_for_best_model="loss",
            greater_is_better=False,
            eval_on_start=last is None,
        )
        failed: NotFiniteError | None = None
        trainer = _JudgingTrainer(objective, batches, select, loop, arguments, run)
        try:
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        except NotFiniteError as error:
            failed = error
        why = "its time was over" if trainer.elapsed() >= 1.0 else "the held-out loss no longer fell"
        why = why if failed is None else "a loss was not finite"
        return _outcome(trainer.state, loop.steps, why, failed)


class _JudgingTrainer(ModuleTrainer):
    """Judges states by the mean loss on `select`, and ends when that no longer falls."""

    def __init__(
        self,
        objective: JudgedModule,
        batches: Batches,
        select: Sequence[Domain],
        loop: LoopSettings,
        arguments: TrainingArguments,
        run: Run,
    ) -> None:
        patience = EarlyStoppingCallback(objective.settings.patience)
        super().__init__(
            objective,
            batches,
            loop,
            arguments,
            [patience, *log_writers(Path(arguments.output_dir))],
            run,
        )
        self._select = select

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean held-out loss of every domain (select split), and the mean over domains."""
        losses = self._select_losses()
        metrics = {
            "eval_loss": sum(losses.values()) / len(losses),
            **{f"eval_{name}_loss": loss for name, loss in losses.items()},
        }
        if not math.isfinite(metrics["eval_loss"]):
            raise NotFiniteError.at(f"held-out text after step {self.state.global_step}", f"loss {metrics['eval_loss']}")
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _select_losses(self) -> dict[str, float]:
        """Loss per domain under the routing that the checkpoint's config says."""
        self.model.eval()
        with torch.no_grad(), self._module.as_configured():
            losses = {}
            for place, text in enumerate(self._select):
                self._run.progress("score held-out text", place, len(self._select))
                losses[text.name] = self._score(text)
            self._run.progress("score held-out text", len(self._select), len(self._select))
            return losses

    def _score(self, text: Domain) -> float:
        total = 0.0
        for batch in make_batches(text.sequences, tokens=tokens_per_pass(self._module.config)):
            given = batch.to(self.args.device)
            item = {"input_ids": given.input_ids, "real": given.mask}
            item |= {} if given.target is None else {"target": given.target}
            item |= {} if given.silent is None else {"silent": given.silent}
            total += float(self.model(score=True, **item)["loss"])
        return total / text.scored_tokens


def _outcome(state: TrainerState, steps: int, why: str, error: NotFiniteError | None) -> TrainingOutcome:
    """What Trainer's state says; `why` it ended before its last step. Raises TrainingError when the start was not judged."""
    before = _held_out(state, 0)
    if before is None:
        assert error is not None
        raise error
    best = state.best_metric if state.best_metric is not None else math.inf
    best_step = int(state.best_global_step) if best < sum(before.values()) / len(before) else 0
    after = _held_out(state, best_step)
    assert after is not None
    stopped = f"ended after step {state.global_step} of {steps}: {why}; the state of step {best_step} was taken"
    return TrainingOutcome(
        steps=state.global_step,
        best_step=best_step,
        before=before,
        after=after,
        stopped=None if state.global_step >= steps else stopped,
        failed=None if error is None else (error.what, error.where, str(error.found)),
    )


def _held_out(state: TrainerState, step: int) -> dict[str, float] | None:
    """Held-out losses by domain as they were logged after a step."""
    for entry in state.log_history:
        if entry.get("step") == step and "eval_loss" in entry:
            return {
                key.removeprefix("eval_").removesuffix("_loss"): value
                for key, value in entry.items()
                if key.startswith("eval_") and key.endswith("_loss") and key != "eval_loss"
            }
    return None


LOG_FILE = "log.csv"
TENSORBOARD_FOLDER = "tensorboard"


def log_writers(folder: Path) -> list[TrainerCallback]:
    """Callbacks that write into `folder`."""
    if find_spec("tensorboard") is None:
        return [_LogFile()]
    from transformers.integrations import TensorBoardCallback

    callback = TensorBoardCallback()
    callback.logging_dir = str(folder / TENSORBOARD_FOLDER)  # whatever the environment says: they go to OUT/results
    return [callback, _LogFile()]


class _LogFile(TrainerCallback):  # type: ignore[misc]
    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            write_log(Path(args.output_dir) / LOG_FILE, state.log_history)


def write_log(path: Path, history: Sequence[Mapping[str, float]]) -> None:
    """One row per step that was logged; a column per figure."""
    rows: dict[int, dict[str, float]] = {}
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
