"""OUT.training of an expert: states of its training, so that the same command goes on after a kill.

checkpoint-N/   states (loaded/states.py)
before.json     the held-out loss before the first step
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from modekit.errors import InterruptError
from modekit.files.output import settle, was_made_by
from modekit.files.read import SMALL, UNREADABLE, read_bytes, read_json
from modekit.files.write import json_bytes
from modekit.loaded.states import whole_states
from modekit.sources.contents import blake3_of
from modekit.sources.model import SPECIALIST_FILE, ModelSource
from modekit.training.states_folder import StatesFolder, digest_of_data


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
            steps = next((path.name.rpartition("-")[2] for path in whole_states(self.path)), None)
            if self.is_held and steps is None:
                self.remove()
            if isinstance(error, (KeyboardInterrupt, InterruptError)):
                raise _interrupted(self.path, steps) from None
            raise
        finally:
            self.release()


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
