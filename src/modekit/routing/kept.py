"""Kept statistics of a domain: files of tensors, and under one metadata key what they are of; and whether they still hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from modekit.errors import CheckpointError, TextError
from modekit.files.copies import disk_errors
from modekit.files.json import parse_json
from modekit.files.read import open_regular
from modekit.files.typed import said_by
from modekit.files.write import appearing, make_folder, remove_if_empty
from modekit.routing.examples import read_examples
from modekit.routing.fit import Fitting
from modekit.text.held_out import fit_documents
from modekit.text.sequences import TokenSequence, none_fits
from modekit.text.splits import text_record

Get = Callable[[str], torch.Tensor]
"""Name -> tensor of a file."""
Header = dict[str, Any]
"""What a file's metadata says of it; each kind of statistics checks its own."""
Provenance = dict[str, Any]
"""What statistics were made from: `text`, a record of the text (text/splits.py); `how`, the settings that decide them."""


class Kept(Protocol):
    """Statistics of a domain."""

    @property
    def source(self) -> Provenance:
        """What they were made from."""


_Kept = TypeVar("_Kept", bound=Kept)


@dataclass(frozen=True)
class FitText:
    """What has to be read of a domain, of which nothing is kept that holds; `source`: of what will be made from it."""

    sequences: list[TokenSequence]
    source: Provenance


def kept_or_text(
    fitting: Fitting, place: int, kept: _Kept | None, how: Mapping[str, object], tokenizer: PreTrainedTokenizerBase, most: int
) -> _Kept | FitText:
    """What is kept of the domain of the expert at `place`, if it was made from the text and the settings `how` of now, of an
    expert that stays, or of text that is gone; else at most so many tokens of its text. Raises TextError.
    """
    expert, settings = fitting.recipe.experts[place], fitting.settings
    if kept is not None and kept.source["how"] != how:
        kept = None
    if kept is not None and expert.name in fitting.stays:
        return kept
    try:
        documents = fit_documents(expert, fitting.root, place, reads=fitting.checkpoint.shape.family.reads)
    except TextError:
        if kept is not None:
            return kept
        raise
    record = text_record(documents, 0)
    if kept is not None and {**kept.source["text"], "tokens": 0} == record:
        return kept
    sequences = read_examples(tokenizer, documents, expert, settings, most=most)
    if not sequences:
        raise none_fits(documents, settings.sequence_length, where=f"experts[{place}] '{expert.name}'")
    tokens = sum(sequence.size for sequence in sequences)
    return FitText(sequences, {"text": {**record, "tokens": tokens}, "how": how})


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


def load_kept(path: Path, make: Callable[[Get, Header], _Kept | None]) -> _Kept | None:
    """What `make` takes from a file's tensors and what they are of; None when there is no file.

    Raises CheckpointError when it is damaged.
    """
    try:
        open_regular(path).close()
        with safe_open(path, framework="pt") as file:
            about = parse_json(file.metadata()["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        source = about["source"]
        if about["sha256"] != _digest(tensors) or not all(isinstance(source[key], dict) for key in ("text", "how")):
            raise ValueError("other numbers than those that a fit wrote")
        return make(tensors.__getitem__, about)
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, RuntimeError) as error:  # also of wrong shapes
        raise CheckpointError(
            "the kept statistics are damaged",
            where=str(path),
            found=said_by(error),
            remedy="delete the file and run `modekit fit` with the text at hand",
        ) from None
