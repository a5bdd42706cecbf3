"""Files of kept statistics: tensors of one domain, and under one metadata key what they are of."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from modekit.errors import CheckpointError
from modekit.files.read import open_regular, parse_json
from modekit.files.typed import shortened
from modekit.files.write import appearing, disk_errors, make_folder, remove_if_empty

_Statistics = TypeVar("_Statistics")
Get = Callable[[str], torch.Tensor]
"""Name -> tensor of a file."""


def save_kept(path: Path, tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> None:
    """Write atomically. Raises OSError, also where safetensors says it in its own way (a full disk)."""
    make_folder(path.parent)
    # One metadata key: safetensors writes several in an order that differs from run to run.
    metadata = {"about": json.dumps(about, sort_keys=True)}
    try:
        with appearing(path) as temporary, disk_errors(path):
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata=metadata)
    except OSError:
        remove_if_empty(path.parent)
        raise


def checked(tensor: torch.Tensor, shape: Sequence[int | None]) -> torch.Tensor:
    """A tensor of a shape (None: any size) whose numbers are finite. Raises ValueError for another."""
    fits = len(tensor.shape) == len(shape) and all(b in (None, a) for a, b in zip(tensor.shape, shape, strict=True))
    if not fits or not torch.isfinite(tensor).all():
        raise ValueError(f"a tensor of shape {list(tensor.shape)[:8]} that does not fit, or is not finite")
    return tensor


def load_kept(path: Path, make: Callable[[Get, dict[str, Any]], _Statistics | None]) -> _Statistics | None:
    """What `make` takes from a file's tensors and what they are of; None when there is no file.

    Raises CheckpointError when the file is damaged.
    """
    try:
        open_regular(path).close()  # safetensors would wait for a pipe
        with safe_open(path, framework="pt") as file:
            about = parse_json(file.metadata()["about"])
            if not isinstance(about, dict):
                raise ValueError("they do not say what they are of")
            return make(file.get_tensor, about)
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, RuntimeError) as error:  # also of wrong shapes
        raise CheckpointError(
            "the kept statistics are damaged",
            where=str(path),
            found=shortened(error) or type(error).__name__,
            remedy="delete the file and run `modekit fit` with the text at hand",
        ) from None
