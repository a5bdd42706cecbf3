"""OUT.training of a mixture: what its training has come to, so that the same command goes on after a kill in whatever phase.

Besides what states_folder.py says:

trained.json       how it ended, once it has
before.json        the table of the mixture as it was
writing.json       what the record in OUT will tell once the trained mixture is in its place: then only tables are missing
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from modekit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from modekit.checkpoint.record import RECORD_FILE, TrainingRecord
from modekit.training.settings import TrainSettings
from modekit.training.states_folder import StatesFolder, digest_of_data
from modekit.training.texts import Text

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

    def claim(self, checkpoint: Checkpoint, settings: TrainSettings, texts: Sequence[Text]) -> None:
        """Begin here, or go on with what a kill left. Raises TrainingError when it is another training's."""
        self.take(digest_of_request(settings, texts), _state(checkpoint))


def digest_of_request(settings: TrainSettings, texts: Sequence[Text]) -> str:
    """What was asked for, but for settings that only trade memory for time."""
    asked = settings.model_dump(mode="json", exclude=_OF_MEMORY)
    return digest_of_data([asked, [[text.corpus.name, text.record, text.selected_by] for text in texts]])


def _state(checkpoint: Checkpoint) -> str:
    return digest_of_data([checkpoint.identity, len(checkpoint.record.training)])


def _digest_of(trainings: Sequence[TrainingRecord]) -> str:
    return digest_of_data([training.model_dump(mode="json") for training in trainings])
