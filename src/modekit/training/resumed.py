"""The state that Trainer goes on from after a kill: read as what it must be, so that a damaged one ends in modekit's own error.

Trainer reads the files of a state as it wrote them, and fails where they are otherwise with whatever error that happens to be.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from modekit.errors import ModekitError, TrainingError
from modekit.files.read import LARGE, read_text
from modekit.files.typed import as_kind, shortened


class _Callback(BaseModel):
    """What one remembers."""

    args: dict[str, Any] = {}
    attributes: dict[str, Any] = {}


class _State(BaseModel):
    """What of trainer_state.json is computed with; figures may be infinite, as a gradient's norm was."""

    model_config = ConfigDict(extra="allow")

    epoch: float
    global_step: NonNegativeInt
    max_steps: NonNegativeInt
    log_history: list[dict[str, float]]
    best_metric: float | None
    best_global_step: NonNegativeInt | None
    best_model_checkpoint: str | None
    stateful_callbacks: dict[str, _Callback | list[_Callback]]


def check_resumed(state: Path) -> None:
    """Raise TrainingError where a state's trainer_state.json is none that Trainer goes on from."""
    path = state / TRAINER_STATE_NAME
    with state_read(state, path):
        as_kind(json.loads(read_text(path, LARGE)), _State)
        read = TrainerState.load_from_json(str(path))
        if not all("step" in entry for entry in read.log_history):
            raise ValueError("log_history: an entry without its step")


@contextmanager
def state_read(state: Path, where: Path | None = None) -> Iterator[None]:
    """While something of a state is read, whatever goes wrong is damage of `where`, else of the state. Raises TrainingError."""
    try:
        yield
    except (ModekitError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # Trainer, torch and safetensors each have their own
        raise TrainingError(
            "what an unfinished training left is damaged",
            where=str(where or state),
            found=shortened(error) or type(error).__name__,
            remedy=f"remove {state.name} to go on from the state before it, or {state.parent.name} to begin anew",
        ) from None
