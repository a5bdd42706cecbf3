"""States of a training between two steps, as transformers' Trainer writes and reads them.

    FOLDER/checkpoint-N/    what moves, optimiser, schedule and random state after step N; `complete` is written last

Trainer reads the files of a state as it wrote them, and fails where they are otherwise with whatever error that happens to be:
here a damaged one ends in modekit's own error.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from modekit.errors import ModekitError, TrainingError
from modekit.files.read import LARGE, open_regular, read_text
from modekit.files.typed import shortened
from modekit.files.write import remove

COMPLETE = "complete"
STATE_FILE = "model.safetensors"  # the name that Trainer looks for
_OTHERS = f"{STATE_FILE} holds other parameters than those that move"


def numbered_states(folder: Path) -> list[Path]:
    """Folders of states, whole or not, the newest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    return sorted(found, key=lambda path: -int(path.name.rpartition("-")[2]))


def whole_states(folder: Path) -> list[Path]:
    """Those that were written to their end, the newest first."""
    return [state for state in numbered_states(folder) if (state / COMPLETE).exists()]


def state_to_resume(folder: Path) -> Path | None:
    """The newest whole state, if there is one; halves that a kill left are removed. Raises TrainingError when it is damaged."""
    whole = whole_states(folder)
    for state in numbered_states(folder):
        if state not in whole:
            remove(state)
    if not whole:
        return None
    path = whole[0] / TRAINER_STATE_NAME
    with state_read(whole[0], path):
        TrainerState(**json.loads(read_text(path, LARGE)))
    return whole[0]


def check_names(state: Path, moving: Collection[str]) -> None:
    """Raise ValueError where a state holds other parameters than those that move; Trainer would leave these as they are."""
    open_regular(state / STATE_FILE).close()  # safetensors would wait for a pipe
    with safe_open(state / STATE_FILE, framework="pt") as file:
        if set(file.keys()) != set(moving):
            raise ValueError(_OTHERS)


def take_state(model: nn.Module, file: Path) -> None:
    """Give a model what moved, as it is in the file of a state. Raises TrainingError where that is damaged."""
    with state_read(file.parent, file):
        open_regular(file).close()
        moved = {name.removeprefix("model."): value for name, value in load_file(file).items()}
        if model.load_state_dict(moved, strict=False).unexpected_keys:
            raise ValueError(_OTHERS)


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
            remedy=f"remove {state.name} to go on from the state before it, or {state.parent.name} to begin again",
        ) from None
