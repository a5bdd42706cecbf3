"""OUT.training: what a training has come to, so that the same command goes on after a kill in whatever phase.

settings.json      whose training this is: digests of what was asked for and of what it started from
checkpoint-N/      states while it trains (engine.py)
trained.json       how it ended, once it has
before.json        the table of the mixture as it was
writing.json       what the record in OUT will tell once the trained mixture is in its place: then only tables are missing
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from modekit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from modekit.checkpoint.record import RECORD_FILE, TrainingRecord
from modekit.errors import TrainingError
from modekit.files.lock import Lock
from modekit.files.marker import MARKER, claim_work_folder
from modekit.files.read import LARGE, UNREADABLE, read_json
from modekit.files.typed import as_kind, shortened
from modekit.files.write import empty_folder, remove, remove_if_empty, sweep, write_json
from modekit.processes import processes
from modekit.training.settings import TrainSettings
from modekit.training.texts import Text

_Kept = TypeVar("_Kept")
_SETTINGS = "settings"
_WRITING = "writing"
_LOCK = "training.lock"
_OF_MEMORY = {"accumulate", "checkpointing", "cache_bytes"}  # what a training may go on with otherwise


class _Claim(BaseModel):
    request: str
    state: str


class TrainingFolder:
    """Beside the folder `out` that the trained mixture goes to. Use `claim`. The main process writes; all read."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out.with_name(out.name + ".training")
        self._lock = Lock(self.path / _LOCK)

    @property
    def has_states(self) -> bool:
        """Whether there is something to go on from."""
        return next(self.path.glob("checkpoint-*"), None) is not None

    @property
    def is_written(self) -> bool:
        """Whether the trained mixture is in its place: its record, which is written last, says so."""
        announced = self.recall(_WRITING, lambda data: as_kind(data, str))
        if announced is None or not (self.out / RECORD_FILE).exists():
            return False
        return bool(announced == _digest_of(open_checkpoint(self.out).record.training))

    def announce(self, trainings: Sequence[TrainingRecord]) -> None:
        """Say, before it is written, which trainings the record of the trained mixture will tell of."""
        self.keep(_WRITING, _digest_of(trainings))

    def recall(self, name: str, make: Callable[[Any], _Kept]) -> _Kept | None:
        """What `make` takes from what was kept under a name; None when nothing was.

        Raises TrainingError where that is damaged, which `make` says by ValueError.
        """
        path = self.path / f"{name}.json"
        try:
            return make(read_json(path, LARGE))
        except FileNotFoundError:
            return None
        except UNREADABLE as error:
            raise TrainingError(
                "what an unfinished training left is damaged", where=str(path), found=shortened(error),
                remedy=f"remove the folder {self.path.name} to begin anew",
            ) from None  # fmt: skip

    def keep(self, name: str, value: Any) -> None:
        """Keep plain data."""
        write_json(self.path / f"{name}.json", value)

    def remove(self) -> None:
        """All is done, or nothing has begun. What says so goes last: a kill in between leaves a folder that is still ours."""
        last = [*(f"{name}.json" for name in (_WRITING, "trained", "before", _SETTINGS)), MARKER, _LOCK]
        empty_folder(self.path, but=last)
        for name in last[:-1]:
            remove(self.path / name)
        self._lock.release()
        remove_if_empty(self.path)

    def release(self) -> None:
        """Let another command at it; what is kept stays."""
        self._lock.release()

    def claim(self, checkpoint: Checkpoint, settings: TrainSettings, texts: Sequence[Text]) -> None:
        """Begin here, or go on with what a kill left. Raises TrainingError when it is another training's."""
        request, state = _request(settings, texts), _state(checkpoint)
        problem = self._claim(request, state) if processes().is_main else None
        problem = processes().agree(problem)
        if problem:
            raise TrainingError(
                "an unfinished training is in the way", where=str(self.path), found=problem,
                remedy="run the command that began it to finish it, or remove the folder",
            )  # fmt: skip

    def _claim(self, request: str, state: str) -> str | None:
        if not claim_work_folder(self.path, "training", self.out.name):
            return "a folder that no training made"
        if not self._lock.take():
            return "a command that is at it"
        sweep(self.path)
        kept = self.recall(_SETTINGS, lambda data: as_kind(data, _Claim))
        if kept is not None and kept.request == request and (kept.state == state or self.is_written):
            return None
        if kept is not None and self.has_states and not self.is_written:
            return "other settings or text" if kept.request != request else "OUT is no longer what it started from"
        empty_folder(self.path, but=(MARKER, _LOCK))
        self.keep(_SETTINGS, {"request": request, "state": state})
        return None


def _request(settings: TrainSettings, texts: Sequence[Text]) -> str:
    """What was asked for, but for settings that only trade memory for time."""
    asked = settings.model_dump(mode="json", exclude=_OF_MEMORY)
    return _digest([asked, [[text.corpus.name, text.record, text.selected_by] for text in texts]])


def _state(checkpoint: Checkpoint) -> str:
    record = checkpoint.record
    return _digest([record.recipe_digest, record.router.sha256, sorted(record.trained.items()), len(record.training)])


def _digest_of(trainings: Sequence[TrainingRecord]) -> str:
    return _digest([training.model_dump(mode="json") for training in trainings])


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
