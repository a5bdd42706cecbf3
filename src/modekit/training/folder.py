"""OUT.training of a mixture: what its training has come to, so that the same command goes on after a kill in whatever phase.

Besides what states_folder.py says:

trained.json       how it ended, once it has
before.json        the table of the mixture as it was
writing.json       what the record in OUT will tell once the trained mixture is in its place: then only tables are missing
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import BaseModel, StringConstraints, model_validator

from modekit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from modekit.checkpoint.record import RECORD_FILE, TrainingRecord
from modekit.errors import TrainingError
from modekit.files.typed import Count, Number, as_kind
from modekit.training.settings import TrainSettings
from modekit.training.states_folder import StatesFolder, digest_of_data
from modekit.training.texts import TrainingText

_OF_MEMORY = {"accumulate", "checkpointing", "cache_bytes"}  # what a training may go on with otherwise


class TrainingFolder(StatesFolder):
    """Beside the folder `out` that the trained mixture goes to. Use `claim`."""

    also_kept: ClassVar[tuple[str, ...]] = ("trained", "before")

    def digest_in_out(self) -> str | None:
        """Of the trainings that the record tells of, which is written last."""
        if not (self.out / RECORD_FILE).exists():
            return None
        return _digest_of(open_checkpoint(self.out).record.training)

    def announce(self, trainings: Sequence[TrainingRecord]) -> None:
        """Say, before it is written, which trainings the record of the trained mixture will tell of."""
        self.announce_digest(_digest_of(trainings))

    def claim(self, checkpoint: Checkpoint, settings: TrainSettings, texts: Sequence[TrainingText]) -> None:
        """Begin here, or go on with what a kill left. Raises TrainingError when it is another training's."""
        self.take(digest_of_request(settings, texts), _state(checkpoint))


def digest_of_request(settings: TrainSettings, texts: Sequence[TrainingText]) -> str:
    """What was asked for, but for settings that only trade memory for time."""
    asked = settings.model_dump(mode="json", exclude=_OF_MEMORY)
    return digest_of_data([asked, [[text.corpus.name, text.record, text.selected_by] for text in texts]])


def _state(checkpoint: Checkpoint) -> str:
    return digest_of_data([checkpoint.identity, len(checkpoint.record.training)])


def _digest_of(trainings: Sequence[TrainingRecord]) -> str:
    return digest_of_data([training.model_dump(mode="json") for training in trainings])


@dataclass(frozen=True)
class JudgedSteps:
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
class TrainingOutcome:
    """A training that has ended and is not written yet; `gates` are those of a cheap one."""

    trained: JudgedSteps
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
    def from_data(cls, data: Any, folder: Path) -> TrainingOutcome:
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
        trained = JudgedSteps(kept.steps, kept.best_step, before, after, kept.stopped, failed, best)
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
