"""OUT.training of an expert: states of its training, so that the same command goes on after a kill.

checkpoint-N/state.safetensors    what moves, optimisers and losses after step N; the folder appears whole
before.json                       the held-out loss before the first step
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from safetensors import safe_open
from safetensors.torch import save_file

from modekit.errors import InterruptError
from modekit.files.output import settle, was_made_by
from modekit.files.read import SMALL, UNREADABLE, open_regular, parse_json, read_bytes, read_json
from modekit.files.typed import as_kind
from modekit.files.write import appearing, disk_errors, json_bytes, make_folder, remove
from modekit.loaded.train_state import Optimizers, Parameters, TrainState, restore
from modekit.sources.contents import blake3_of
from modekit.sources.model import SPECIALIST_FILE, ModelSource
from modekit.training.resumed import state_read
from modekit.training.states_folder import StatesFolder, digest_of_data

STATE_SECONDS = 120.0
"""Between two states: what a kill costs at most, unless writing one takes long."""
_SHARE = 20  # at most one second of so many is spent on writing states
_STATE_FILE = "state.safetensors"
_LOSSES = "losses"


class SpecialistFolder(StatesFolder):
    """OUT.training of a model or adapter that is made alone."""

    changed: ClassVar[str] = "student or teacher, or the base, are no longer what it started from"
    also_kept: ClassVar[tuple[str, ...]] = ("before",)

    def digest_in_out(self) -> str | None:
        """Of what OUT says of how it was made, which nobody else writes."""
        try:
            return hashlib.sha256(read_bytes(self.out / SPECIALIST_FILE, SMALL)).hexdigest()
        except UNREADABLE:
            return None

    def finished(self, made_by: str) -> dict[str, Any] | None:
        """What OUT says of how it was made, where this very command made it and was killed while it tidied up; else None."""
        if not was_made_by(self.out, made_by):
            return None
        self.tidy()
        settle(self.out)
        return dict(read_json(self.out / SPECIALIST_FILE))

    def announce(self, record: Mapping[str, Any]) -> None:
        """Say, before it is written, which record OUT will hold."""
        self.announce_digest(hashlib.sha256(json_bytes(record)).hexdigest())

    @contextmanager
    def held(self, request: str, state: str) -> Iterator[None]:
        """Hold the folder while the block trains and writes; digests as `take` has them. When all is done, it goes.

        A training that stops before its first state leaves nothing. Raises InterruptError for Ctrl-C.
        """
        try:
            self.take(request, state)
            yield
            self.remove()
            settle(self.out)
        except BaseException as error:
            steps = next((path.name.rpartition("-")[2] for path in self.numbered()), None)
            if self.is_held and steps is None:
                self.remove()
            if isinstance(error, (KeyboardInterrupt, InterruptError)):
                raise _interrupted(self.path, steps) from None
            raise
        finally:
            self.release()

    def numbered(self) -> list[Path]:
        """Folders of states, the newest first."""
        found = [path for path in self.path.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
        return sorted(found, key=lambda path: -int(path.name.rpartition("-")[2]))


def _interrupted(folder: Path, steps: str | None) -> InterruptError:
    if steps is None:
        return InterruptError("interrupted; nothing was kept", remedy="run the command again to start over")
    return InterruptError(
        f"interrupted; the training is kept up to step {steps}",
        where=str(folder),
        remedy="run the same command again to go on from there, or remove the folder",
    )


def digest_of_source(source: ModelSource) -> str:
    """Of a model's config and weights as they are now."""
    return digest_of_data([dict(source.config), [[file.name, blake3_of(file)] for file in source.files]])


class KeptStates:
    """States in such a folder: one every two minutes, and the last one alone."""

    def __init__(self, folder: SpecialistFolder, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._clock = folder, clock
        self._next = clock() + STATE_SECONDS

    @property
    def is_due(self) -> bool:
        """Whether a state should be kept now."""
        return self._clock() >= self._next

    def restore(self, parameters: Parameters, optimizers: Optimizers) -> list[float]:
        """Put the last state back, and return the losses so far. Raises TrainingError where it is damaged."""
        for path in self._folder.numbered()[:1]:
            with state_read(path):
                open_regular(path / _STATE_FILE).close()  # safetensors would wait for a pipe
                with safe_open(path / _STATE_FILE, framework="pt") as file:
                    losses = as_kind(parse_json(file.metadata()[_LOSSES]), list[float])
                    state = TrainState(losses, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
                return restore(state, parameters, optimizers)
        return []

    def keep(self, state: TrainState) -> None:
        """Write a state, then remove those before it. Raises OSError."""
        started, older = self._clock(), self._folder.numbered()
        path = self._folder.path / f"checkpoint-{len(state.losses)}"
        if path not in older:
            with appearing(path) as temporary:
                make_folder(temporary)
                with disk_errors(path):
                    tensors = {name: tensor.cpu().contiguous() for name, tensor in state.tensors.items()}
                    save_file(tensors, temporary / _STATE_FILE, metadata={_LOSSES: json.dumps(state.losses)})
        for each in older:
            if each != path:
                remove(each)
        self._next = self._clock() + max(STATE_SECONDS, _SHARE * (self._clock() - started))
