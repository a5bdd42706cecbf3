"""The training loop of a mixture or student: loaded/engine.py's, with states that are judged, and OUT.training/log.csv.

A state is worth what the held-out loss says: the mean over domains on the select split.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from modekit.evaluation.domains import Domain, tokens_per_pass
from modekit.files.write import write_file
from modekit.loaded.engine import Loop, LoopSettings, NotFiniteError, TrainedModule
from modekit.loaded.passes import losses_of
from modekit.loaded.states import History
from modekit.processes import processes
from modekit.run import Run
from modekit.text.sequences import Batch, make_batches
from modekit.training.batches import Batches
from modekit.training.folder import TrainingOutcome
from modekit.training.settings import TrainSettings

LOG_FILE = "log.csv"
"""Loss, its parts, learning rate and held-out losses by step."""


class JudgedModule(TrainedModule):
    """A model whose losses are summed over a batch's tokens, and that scores held-out text.

    `gate_names`: parameters of routers, which have a learning rate of their own; `weights`: how much each loss counts.
    """

    def __init__(self, model: PreTrainedModel, settings: TrainSettings, weights: Mapping[str, float]) -> None:
        super().__init__(model)
        self.settings = settings
        self._weights = weights
        self.gate_names: list[str] = []
        self._sums: dict[str, float] = {}

    def losses(self, batch: Batch, item: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Every loss of a batch from `Batches`, summed over its tokens, by name."""
        raise NotImplementedError

    def forward(self, score: bool = False, **item: torch.Tensor) -> torch.Tensor:
        """The loss of a batch from `Batches`: its share of the step's, per predicted token of the step.

        With `score`, the sum of -log p over the predicted tokens of a padded batch (input_ids, real, target of pairs, silent).
        """
        batch = Batch(item["input_ids"], item["real"], (), item.get("target"), item.get("silent"))
        if score:
            return losses_of(self.model, batch).sum()
        losses = self.losses(batch, item)
        targets = item["targets"].to(next(iter(losses.values())).device)
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value.detach() / targets)
        parts = [self._weights[name] * value for name, value in losses.items() if self._weights[name]]
        total = torch.stack(parts).sum() if parts else 0.0 * torch.stack([*losses.values()]).sum()
        share: torch.Tensor = total / targets
        return share

    def groups(self) -> list[dict[str, Any]]:
        """A rate of their own for routers, whose weights do not decay."""
        gates, settings = set(self.gate_names), self.settings
        moving = [(name in gates, each) for name, each in self.model.named_parameters() if each.requires_grad]
        routers, others = ([each for is_gate, each in moving if is_gate is wanted] for wanted in (True, False))
        groups = [
            {"params": routers, "lr": settings.learning_rate, "weight_decay": 0.0},
            {"params": others, "lr": settings.backbone_learning_rate, "weight_decay": settings.weight_decay},
        ]
        return [group for group in groups if group["params"]]

    def drain(self) -> dict[str, float]:
        """Every loss of the last step, of all processes' parts, per predicted token of the step."""
        summed = processes().add_up(torch.tensor([*self._sums.values()])).tolist()
        drained, self._sums = {f"loss_{name}": value for name, value in zip(self._sums, summed, strict=True)}, {}
        return drained

    def scored(self, select: Sequence[Domain], run: Run, wrapped: nn.Module) -> dict[str, float]:
        """Held-out loss by domain, of the model as it is wrapped."""
        losses = {}
        for place, text in enumerate(select):
            run.progress("score held-out text", place, len(select))
            total = 0.0
            for batch in make_batches(text.sequences, tokens=tokens_per_pass(self.config)):
                given = batch.to(self.model.device)
                item = {"input_ids": given.input_ids, "real": given.mask, "target": given.target, "silent": given.silent}
                total += float(wrapped(score=True, **item))
            losses[text.name] = total / text.scored_tokens
        run.progress("score held-out text", len(select), len(select))
        return losses


def run_trainer(
    module: JudgedModule, batches: Batches, select: Sequence[Domain], loop: LoopSettings, folder: Path, run: Run
) -> TrainingOutcome:
    """Train until the steps are done or the held-out loss stops falling, from the last whole state in `folder` on.

    Raises TrainingError when that state is damaged.
    """
    going = Loop(module, batches, loop, folder, run, partial(module.scored, select, run))
    failed: NotFiniteError | None = None
    try:
        going.go()
    except NotFiniteError as error:
        failed = error
    if processes().is_main:
        write_file(folder / LOG_FILE, log_of(going.history))
    judged = {int(entry["step"]): entry for entry in going.history if "eval_loss" in entry}
    if not judged:  # then a loss of the start was not finite
        assert failed is not None
        raise failed
    best = going.best_step if judged[going.best_step]["eval_loss"] < judged[0]["eval_loss"] else 0
    why = "the held-out loss no longer fell" if failed is None else "a loss was not finite"
    stopped = f"ended after step {going.step} of {loop.steps}: {why}; the state of step {best} was taken"
    return TrainingOutcome(
        steps=going.step,
        best_step=best,
        losses={text.name: (judged[0][_column(text)], judged[best][_column(text)]) for text in select},
        stopped=None if going.step >= loop.steps else stopped,
        failed=None if failed is None else (failed.what, failed.where, str(failed.found)),
    )


def _column(text: Domain) -> str:
    return f"eval_{text.name}_loss"


def log_of(history: History) -> bytes:
    """A table of what was logged as CSV: a row per step, a column per figure."""
    rows: dict[int, dict[str, float]] = {}
    for entry in history:
        rows.setdefault(int(entry["step"]), {}).update(entry)
    named = {key for row in rows.values() for key in row}
    columns = sorted(named, key=lambda key: (key != "step", key.startswith("eval_"), not key.startswith("loss"), key))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row | {"step": step} for step, row in sorted(rows.items()))
    return text.getvalue().encode()
