"""How a training ended, before anything of it is written: kept in OUT.training, so that a kill costs no step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modekit.errors import TrainingError


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


@dataclass(frozen=True)
class Ended:
    """A training that has ended and is not written yet; `gates` are those of a cheap one."""

    trained: Trained
    notes: list[str]
    parameters: int
    tokens: int
    gates: dict[str, torch.Tensor] | None = None

    def as_data(self) -> dict[str, Any]:
        """Plain data for JSON; gates are not kept."""
        trained = self.trained
        failed = None if trained.failed is None else [trained.failed.what, trained.failed.where, trained.failed.found]
        return {
            "steps": trained.steps, "best_step": trained.best_step, "before": dict(trained.before),
            "after": dict(trained.after), "stopped": trained.stopped, "failed": failed,
            "best": None if trained.best is None else str(trained.best), "notes": self.notes,
            "parameters": self.parameters, "tokens": self.tokens,
        }  # fmt: skip

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Ended:
        """From what `as_data` gave."""
        failed = None
        if data["failed"]:
            what, where, found = data["failed"]
            failed = TrainingError(what, where=where, found=found)
        best = None if data["best"] is None else Path(data["best"])
        trained = Trained(data["steps"], data["best_step"], data["before"], data["after"], data["stopped"], failed, best)
        return cls(trained, data["notes"], data["parameters"], data["tokens"])
