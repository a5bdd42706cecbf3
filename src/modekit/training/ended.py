"""How a training ended, before anything of it is written: kept in OUT.training, so that a kill costs no step."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, StringConstraints, model_validator

from modekit.errors import TrainingError
from modekit.files.typed import Count, Number, as_kind


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

    def as_data(self, folder: Path) -> dict[str, Any]:
        """Plain data for JSON, `best` by its name in the training's folder; gates are not kept."""
        trained = self.trained
        failed = None if trained.failed is None else [trained.failed.what, trained.failed.where, str(trained.failed.found)]
        return {
            "steps": trained.steps,
            "best_step": trained.best_step,
            "before": _without_nan(trained.before),
            "after": _without_nan(trained.after),
            "stopped": trained.stopped,
            "failed": failed,
            "best": None if trained.best is None else trained.best.relative_to(folder).as_posix(),
            "notes": self.notes,
            "parameters": self.parameters,
            "tokens": self.tokens,
        }

    @classmethod
    def from_data(cls, data: Any, folder: Path) -> Ended:
        """From what `as_data` gave. Raises ValueError for anything else, and where `best` leads out of `folder`."""
        kept = as_kind(data, _Kept)
        failed = None
        if kept.failed:
            what, where, found = kept.failed
            failed = TrainingError(what, where=where, found=found)
        best = None if kept.best is None else folder / kept.best
        if best is not None and not _lies_in(folder, best):
            raise ValueError(f"best: {kept.best} leads out of the folder")
        before, after = ({name: math.nan if loss is None else loss for name, loss in each.items()} for each in kept.losses)
        trained = Trained(kept.steps, kept.best_step, before, after, kept.stopped, failed, best)
        return cls(trained, kept.notes, kept.parameters, kept.tokens)


class _Kept(BaseModel):
    steps: Count
    best_step: Count
    before: dict[str, Number | None]
    after: dict[str, Number | None]
    stopped: str | None
    failed: tuple[str, str | None, str | None] | None
    best: Annotated[str, StringConstraints(pattern=r"^checkpoint-[0-9]{1,18}/[a-z]+\.safetensors$")] | None
    notes: list[str]
    parameters: Count
    tokens: Count

    @property
    def losses(self) -> tuple[dict[str, float | None], dict[str, float | None]]:
        return self.before, self.after

    @model_validator(mode="after")
    def _fits_together(self) -> _Kept:
        if self.before.keys() != self.after.keys():
            raise ValueError("before and after are of other domains")
        if (self.best is None) != (self.best_step == 0):
            raise ValueError("best and best_step do not go together")
        return self


def _without_nan(losses: Mapping[str, float]) -> dict[str, float | None]:
    return {name: loss if math.isfinite(loss) else None for name, loss in losses.items()}


def _lies_in(folder: Path, file: Path) -> bool:
    """Whether a file is in a folder, and not by a link to somewhere else; it may be gone when all is written."""
    return Path(os.path.realpath(file)).is_relative_to(os.path.realpath(folder))
