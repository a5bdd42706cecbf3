"""Kept statistics of a domain: files of tensors, and under one metadata key what they are of; and whether they still hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from modekit.errors import CheckpointError, TextError
from modekit.files.read import open_regular, parse_json
from modekit.files.typed import shortened
from modekit.files.write import appearing, disk_errors, make_folder, remove_if_empty
from modekit.routing.fit import Fitting
from modekit.text.document import Document
from modekit.text.held_out import fit_documents

_Statistics = TypeVar("_Statistics")
Get = Callable[[str], torch.Tensor]
"""Name -> tensor of a file."""
Header = dict[str, Any]
"""What a file's metadata says of it; each kind of statistics checks its own."""
Provenance = dict[str, Any]
"""What statistics were made from: `text`, a record of the text (text/splits.py); `how`, the settings that decide them."""


def documents_to_read(
    fitting: Fitting, place: int, kept: Provenance | None, how: Mapping[str, object]
) -> list[Document] | None:
    """The text of the expert at `place`; None where what is kept of it holds without: of an expert that stays, or whose text
    is gone.

    `kept`: what the kept statistics were made from, None without any; `how`: the settings of now. Raises TextError.
    """
    expert = fitting.recipe.experts[place]
    holds = kept is not None and kept.get("how") == how and isinstance(kept.get("text"), dict)
    if holds and expert.name in fitting.stays:
        return None
    try:
        return fit_documents(expert, fitting.root, place, reads=fitting.reads)
    except TextError as error:
        if holds:
            return None
        raise _without_text(error, kept and kept.get("how"), how) from None


def _without_text(error: TextError, kept: object, how: Mapping[str, object]) -> TextError:
    """The error of text that is gone: where what is kept of it would do but for chats, it says how to do without them."""
    if kept == how or not isinstance(kept, dict) or kept != {key: value for key, value in how.items() if key != "chat"}:
        return error
    return TextError(
        f"{error.what}, and what is kept of it knows no chats",
        where=error.where,
        found=error.found,
        remedy="put the text back, or leave chats out: router: {chat: false}, or `modekit fit OUT chat=false`",
    )


def save_kept(path: Path, tensors: Mapping[str, torch.Tensor], about: Mapping[str, object]) -> None:
    """Write atomically. Raises OSError, also where safetensors says it in its own way (a full disk)."""
    make_folder(path.parent)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    # One metadata key: safetensors writes several in an order that differs from run to run.
    metadata = {"about": json.dumps({**about, "sha256": _digest(tensors)}, sort_keys=True)}
    try:
        with appearing(path) as temporary, disk_errors(path):
            save_file(tensors, temporary, metadata=metadata)
    except OSError:
        remove_if_empty(path.parent)
        raise


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + str(tensor.dtype).encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def checked(tensor: torch.Tensor, shape: Sequence[int | None]) -> torch.Tensor:
    """A tensor of a shape (None: any size) whose numbers are finite. Raises ValueError for another."""
    fits = len(tensor.shape) == len(shape) and all(b in (None, a) for a, b in zip(tensor.shape, shape, strict=True))
    if not fits or not torch.isfinite(tensor).all():
        raise ValueError(f"a tensor of shape {list(tensor.shape)[:8]} that does not fit, or is not finite")
    return tensor


def load_kept(path: Path, make: Callable[[Get, Header], _Statistics | None]) -> _Statistics | None:
    """What `make` takes from a file's tensors and what they are of; None when there is no file.

    Raises CheckpointError when the file is damaged.
    """
    try:
        open_regular(path).close()  # safetensors would wait for a pipe
        with safe_open(path, framework="pt") as file:
            about = parse_json(file.metadata()["about"])
            if not isinstance(about, dict):
                raise ValueError("they do not name their router")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if about.get("sha256") != _digest(tensors):
                raise ValueError("other numbers than those that a fit wrote")
            return make(tensors.__getitem__, about)
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, RuntimeError) as error:  # also of wrong shapes
        raise CheckpointError(
            "the kept statistics are damaged",
            where=str(path),
            found=shortened(error) or type(error).__name__,
            remedy="delete the file and run `modekit fit` with the text at hand",
        ) from None
