"""What a training keeps beside its output, OUT.training, so that the same command goes on after a kill, and another does not.

settings.json      whose training this is: digests of what was asked for and of what it started from
checkpoint-N/      states while it trains (loaded/states.py)
before.json        held-out losses before the first step
trained.json       how it ended, once it has
writing.json       the digest of what will be in OUT once it is written: then what is here is done with
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.checkpoint.record import RECORD_FILE, TrainingRecord
from modekit.errors import InterruptError, OutputError, TrainingError
from modekit.files.copies import link_in, sweep
from modekit.files.marker import MARKER
from modekit.files.output import LOCK, WorkFolder
from modekit.files.read import LARGE, UNREADABLE, read_json
from modekit.files.typed import Count, Number, as_kind, shortened
from modekit.files.write import digest_of_data, empty_folder, write_json
from modekit.loaded.states import STATE_FILE, whole_states
from modekit.processes import processes
from modekit.training.settings import TrainSettings
from modekit.training.texts import TrainingText

_Kept = TypeVar("_Kept")
_SETTINGS = "settings"
WRITING = "writing"
_OF_MEMORY = {"accumulate", "checkpointing"}  # what a training may go on with otherwise


class _Claim(BaseModel):
    request: str
    state: str


class StatesFolder:
    """Beside the folder `out` that will hold what was trained. Use `take`. The main process writes; all read."""

    tables_follow = False
    """Whether a table is still to come once what was trained is in its place."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self._work = WorkFolder(out, "training", [f"{name}.json" for name in (WRITING, "trained", "before", _SETTINGS)])
        self.path = self._work.path

    @property
    def is_held(self) -> bool:
        """Whether this object has it, and nobody else."""
        return self._work.lock.is_held

    @property
    def has_states(self) -> bool:
        """Whether there is something to go on from."""
        return next(self.path.glob("checkpoint-*"), None) is not None

    @property
    def is_written(self) -> bool:
        """Whether what was trained is in its place, as was announced."""
        announced = self.recall(WRITING, lambda data: as_kind(data, str))
        return announced is not None and announced == self.digest_in_out()

    def digest_in_out(self) -> str | None:
        """Of what says in OUT how it was trained, kept under WRITING before it is written; None where nothing does."""
        raise NotImplementedError

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
                "what an unfinished training left is damaged",
                where=str(path),
                found=shortened(error),
                remedy=f"remove the folder {self.path.name} to begin again",
            ) from None

    def keep(self, name: str, value: Any) -> None:
        """Keep plain data."""
        write_json(self.path / f"{name}.json", value)

    def tidy(self) -> None:
        """Remove what nothing can be gone on from: what a kill left of a training before its first state, after its end, or
        while it was taken away. Not where another command is at it.
        """
        if self._work.is_ours and (self.is_written or not self.has_states) and self._work.lock.take():
            self._work.clear()

    @contextmanager
    def held(self, request: str, state: str) -> Iterator[None]:
        """Hold the folder while the block trains and writes; digests as `take` has them. When all is done, it goes.

        A training that stops before its first state leaves nothing. Raises InterruptError for Ctrl-C, and as `take`.
        """
        done = False
        try:
            self.take(request, state)
            yield
            done = True
            if self.is_held:
                self._work.clear()
        except BaseException as error:
            steps = next((path.name.rpartition("-")[2] for path in whole_states(self.path)), None)
            ended = steps is None or not self.tables_follow
            done = done or (ended and self.is_held and self.is_written)
            if self.is_held and (done or steps is None):
                self._work.clear()
            if isinstance(error, (KeyboardInterrupt, InterruptError)):
                if done:
                    raise InterruptError(f"interrupted; {self.out.name} was finished by then", where=str(self.out)) from None
                if steps is None:
                    raise InterruptError(
                        "interrupted; nothing was kept", remedy="run the command again to start over"
                    ) from None
                raise InterruptError(
                    f"interrupted; the training is kept up to step {steps}",
                    where=str(self.path),
                    remedy="run the same command again to go on from there, or remove the folder",
                ) from None
            raise
        finally:
            self._work.lock.release()

    def take(self, request: str, state: str) -> None:
        """Begin here, or go on with what a kill left; digests of what is asked for and of what it starts from.

        Raises TrainingError when it is another training's.
        """
        problem = self._claim(request, state) if processes().is_main else None
        problem = processes().agree(problem)
        if problem:
            raise TrainingError(
                "an unfinished training is in the way",
                where=str(self.path),
                found=problem,
                remedy="run the command that began it to finish it, or remove the folder",
            )

    def _claim(self, request: str, state: str) -> str | None:
        try:
            self._work.take()
        except OutputError as error:
            return error.what
        sweep(self.path)
        leads_out = link_in(self.path)
        if leads_out is not None:
            return leads_out
        kept = self.recall(_SETTINGS, lambda data: as_kind(data, _Claim))
        if kept is not None and kept.request == request and (kept.state == state or self.is_written):
            return None
        if kept is not None and self.has_states and not self.is_written:
            return "other settings or text" if kept.request != request else "what it started from is no longer the same"
        empty_folder(self.path, but=(MARKER, LOCK))
        self.keep(_SETTINGS, {"request": request, "state": state})
        return None


class TrainingFolder(StatesFolder):
    """Beside the folder `out` that the trained mixture goes to. Once that is in its place, only tables are missing."""

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
        return TrainingError(
            what,
            where=where,
            found=found,
            remedy="lower learning_rate or backbone_learning_rate, or leave this text out; the best state so far was taken",
        )

    def best_state(self, folder: Path) -> Path:
        """The file with what moved as it was in the best state, by its names in the model; gone when all is written."""
        return folder / f"checkpoint-{self.best_step}" / STATE_FILE
