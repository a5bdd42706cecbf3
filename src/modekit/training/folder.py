"""OUT.training of a mixture: what its training has come to, so that the same command goes on after a kill in whatever phase.

It has what states_folder.py says. Once the trained mixture is in its place, only tables are missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.checkpoint.record import RECORD_FILE, TrainingRecord
from modekit.errors import TrainingError
from modekit.files.typed import Count, Number, as_kind
from modekit.files.write import digest_of_data
from modekit.loaded.states import STATE_FILE
from modekit.training.settings import TrainSettings
from modekit.training.states_folder import WRITING, StatesFolder
from modekit.training.texts import TrainingText

_OF_MEMORY = {"accumulate", "checkpointing"}  # what a training may go on with otherwise


class TrainingFolder(StatesFolder):
    """Beside the folder `out` that the trained mixture goes to."""

    tables_follow = True

    def digest_in_out(self) -> str | None:
        """Of the trainings that the record tells of, which is written last."""
        if not (self.out / RECORD_FILE).exists():
            return None
        return _digest_of(open_checkpoint(self.out).record.training)

    def announce(self, trainings: Sequence[TrainingRecord]) -> None:
        """Say, before it is written, which trainings the record of the trained mixture will tell of."""
        self.keep(WRITING, _digest_of(trainings))

    def outcome(self) -> TrainingOutcome | None:
        """How the training ended, if it has. Raises TrainingError where what is kept of that is damaged."""
        return self.recall("trained", lambda data: as_kind(data, TrainingOutcome))


def state_of(checkpoint: Checkpoint) -> str:
    """A digest of what a training of a mixture starts from."""
    return digest_of_data([checkpoint.identity, len(checkpoint.record.training)])


def digest_of_request(settings: TrainSettings, texts: Sequence[TrainingText]) -> str:
    """What was asked for, but for settings that only trade memory for time."""
    asked = settings.model_dump(mode="json", exclude=_OF_MEMORY)
    return digest_of_data([asked, [[text.corpus.name, text.record, text.selected_by] for text in texts]])


def _digest_of(trainings: Sequence[TrainingRecord]) -> str:
    return digest_of_data([training.model_dump(mode="json") for training in trainings])


class TrainingOutcome(BaseModel, frozen=True):
    """How a training ended, before anything of it is written: trained.json, so that a kill costs no step.

    Attributes:
        steps: how many were taken.
        best_step: after which the held-out loss was lowest; 0 where no state was better than the start.
        losses: held-out losses by domain, at the start and at the best state.
        stopped: after which step it ended and why, if that was not the last one.
        failed: the error that ended it: what, where, found.
        notes: what is to be said of it.
        parameters: how many moved.
        tokens: how many were read.
    """

    steps: Count
    best_step: Count
    losses: dict[str, tuple[Number, Number]]
    stopped: str | None = None
    failed: tuple[str, str | None, str | None] | None = None
    notes: list[str] = []
    parameters: Count = 0
    tokens: Count = 0

    @property
    def improved(self) -> bool:
        """Whether a state was better than the start."""
        return self.best_step > 0

    @property
    def error(self) -> TrainingError | None:
        """What the user should see once all is written."""
        if self.failed is None:
            return None
        what, where, found = self.failed
        remedy = "lower learning_rate or backbone_learning_rate, or leave this text out; the best state so far was taken"
        return TrainingError(what, where=where, found=found, remedy=remedy)

    def best_state(self, folder: Path) -> Path:
        """The file with what moved as it was in the best state, by its names in the model; gone when all is written."""
        return folder / f"checkpoint-{self.best_step}" / STATE_FILE
