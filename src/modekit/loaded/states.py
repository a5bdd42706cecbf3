"""States of a training between two steps: plain tensors and JSON.

FOLDER/checkpoint-N/model.safetensors        what moves, after step N, by its names in the module
                    optimizer.safetensors    of each of these what AdamW keeps, and torch's generators of all processes
                    history.json             what all steps logged
                    complete                 written last
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from pydantic import BaseModel
from safetensors.torch import load_file, save_file
from torch import nn

from modekit.errors import ModekitError, TrainingError
from modekit.files.copies import disk_errors, new_folder
from modekit.files.read import LARGE, open_regular, read_json
from modekit.files.typed import as_kind, said_by
from modekit.files.write import appearing, remove, sync_tree, write_file, write_json

_COMPLETE, _HISTORY = "complete", "history.json"
STATE_FILE, OPTIMIZER_FILE = "model.safetensors", "optimizer.safetensors"
_OTHERS = f"{STATE_FILE} holds other parameters than those that move"

History = list[dict[str, float]]
"""What each step logged, with its number under `step`; figures of a state that was judged are an entry of their own."""
Tensors = Mapping[str, torch.Tensor]


class _Kept(BaseModel):
    history: History


def numbered_states(folder: Path) -> list[Path]:
    """Folders of states, whole or not, the newest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    return sorted(found, key=lambda path: -int(path.name.rpartition("-")[2]))


def whole_states(folder: Path) -> list[Path]:
    """Those that were written to their end, the newest first."""
    return [state for state in numbered_states(folder) if (state / _COMPLETE).exists()]


def write_state(folder: Path, step: int, moved: Tensors, optimizer: Tensors, history: History) -> None:
    """Write the state after a step."""
    state = folder / f"checkpoint-{step}"
    new_folder(state)
    with disk_errors(state):
        for name, tensors in ((STATE_FILE, moved), (OPTIMIZER_FILE, optimizer)):
            with appearing(state / name) as temporary:
                save_file(dict(tensors), temporary)
    write_json(state / _HISTORY, {"history": history})
    sync_tree(state)
    write_file(state / _COMPLETE, b"")


def read_state(state: Path, moving: Collection[str]) -> tuple[Tensors, Tensors, History]:
    """What moves, what the optimiser kept, and the log of a whole state. Raises TrainingError for damage."""
    with damaged(state, state / _HISTORY):
        history = as_kind(read_json(state / _HISTORY, LARGE), _Kept).history
    with damaged(state):
        moved, optimizer = _read(state / STATE_FILE), _read(state / OPTIMIZER_FILE)
        if moved.keys() != set(moving):
            raise ValueError(_OTHERS)
    return moved, optimizer, history


def tidy(folder: Path, best: int) -> None:
    """Remove all states but the two newest and that of the best step, and halves that a kill left."""
    whole = whole_states(folder)
    kept = {*whole[:2], folder / f"checkpoint-{best}"}
    for state in numbered_states(folder):
        if state not in whole or state not in kept:
            remove(state)


def take_state(model: nn.Module, file: Path) -> None:
    """Give a model what moved, as it is in the file of a state. Raises TrainingError where that is damaged."""
    with damaged(file.parent, file):
        moved = {name.removeprefix("model."): value for name, value in _read(file).items()}
        if model.load_state_dict(moved, strict=False).unexpected_keys:
            raise ValueError(_OTHERS)


def _read(file: Path) -> dict[str, torch.Tensor]:
    open_regular(file).close()  # safetensors would wait for a pipe
    return load_file(file)


@contextmanager
def damaged(state: Path, where: Path | None = None) -> Iterator[None]:
    """While something of a state is read, whatever goes wrong is damage of `where`, else of the state. Raises TrainingError."""
    try:
        yield
    except (ModekitError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # torch and safetensors each have their own
        raise TrainingError(
            "what an unfinished training left is damaged",
            where=str(where or state),
            found=said_by(error),
            remedy=f"remove {state.name} to go on from the state before it, or {state.parent.name} to begin again",
        ) from None
