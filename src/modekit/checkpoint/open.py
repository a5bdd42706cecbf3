"""A finished checkpoint is opened: is it whole, and its router the one that modekit.json records?"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import numpy as np

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.evidence_file import read_evidence
from modekit.checkpoint.record import RECORD_FILE, MixtureRecord
from modekit.checkpoint.router_file import FIT_ANEW, sha256_of
from modekit.errors import CheckpointError, UnsupportedError
from modekit.files.change import finish_change, is_in_the_making, mend
from modekit.files.read import UNREADABLE, content_of, read_json
from modekit.files.typed import as_kind, shortened
from modekit.planning.plan import ROUTER_FILE
from modekit.planning.shape import BUILD_AGAIN
from modekit.sources.contents import OpenFiles
from modekit.sources.header import DTYPE_NAMES
from modekit.weights.numeric import is_finite


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint's record, config, headers and router file.

    Raises CheckpointError when the folder is none, damaged or of another format, or its router is not the one that it
    records; SourceError when a shard is damaged.
    """
    checkpoint = open_with_any_router(folder)
    check_router(checkpoint)
    return checkpoint


def open_with_any_router(folder: Path) -> Checkpoint:
    """The same for those who replace the router, or say themselves what is wrong with it."""
    if is_in_the_making(folder):
        raise CheckpointError(
            "an unfinished build is no checkpoint", where=str(folder), remedy="run the same command again to finish it"
        )
    with suppress(OSError):  # where nothing can be written, what is there is read as it is
        mend(folder)
        finish_change(folder)
    try:
        record = as_kind(read_json(folder / RECORD_FILE), MixtureRecord)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            "not a modekit checkpoint: modekit.json is missing",
            where=str(folder),
            found=None if folder.is_dir() else "a file" if os.path.lexists(folder) else "there is no such folder",
            remedy="give the folder that `modekit mix` or `modekit build` wrote; to finish a build that was cut short "
            "(OUT.partial), run the same command again",
        ) from None
    except UNREADABLE as error:
        raise CheckpointError(
            "modekit.json is damaged or of another version", where=str(folder), found=shortened(error), remedy=BUILD_AGAIN
        ) from None
    checkpoint = Checkpoint(folder, record)
    _ = checkpoint.tensors  # read now, so that damage shows before any work
    return checkpoint


def check_router(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless the router's gates, and its table in the embedding, are those of config.json and
    modekit.json, and finite; SourceError where they cannot be read. What a checkpoint without gates has is not compared.

    Where a training moved the embedding, that is known by its own digest.
    """
    file = checkpoint.folder / ROUTER_FILE
    inside = {name: ref for name, ref in checkpoint.tensors.items() if ref.file == file}
    shapes = {name: ref.shape for name, ref in inside.items() if ref.dtype in DTYPE_NAMES}
    if {slot.name: slot.shape for slot in checkpoint.slots} != shapes:
        raise _other_router(file, "gates of other names or shapes, or a strange dtype", "those of config.json")
    if inside:
        digest = sha256_of(content_of(file))
        gates = zip(checkpoint.slots, checkpoint.gates(), strict=True)
        broken = next((slot.name for slot, gate in gates if not np.isfinite(gate).all()), None)
        _compare(file, digest, broken, checkpoint.record.router.sha256)
    if checkpoint.shape.channels is None:
        return
    channels, embedding = checkpoint.carrier
    if embedding.dtype not in DTYPE_NAMES or embedding.shape[1:] != (channels.hidden + channels.spare,):
        raise _other_router(
            embedding.file,
            f"{embedding.dtype} {list(embedding.shape)}",
            f"{channels.hidden + channels.spare} columns",
        )
    trained = checkpoint.record.trained.get(embedding.name)
    expected = checkpoint.record.router.evidence if trained is None else trained
    columns = read_evidence(channels, embedding)
    with OpenFiles() as opened:
        digest = sha256_of(columns) if trained is None else opened.blake3(embedding)
    _compare(embedding.file, digest, None if is_finite(columns, embedding.dtype) else embedding.name, expected)


def _compare(file: Path, found: str, broken: str | None, expected: str) -> None:
    if found != expected:
        raise _other_router(file, f"digest {found[:16]}", f"{expected[:16]}, as {RECORD_FILE} has it")
    if broken is not None:
        raise _other_router(file, f"NaN or Inf in {broken}", "finite numbers")


def _other_router(file: Path, found: str, expected: str) -> CheckpointError:
    return CheckpointError(
        "the router, its file or its table in the embedding, is not the one that modekit.json records",
        where=str(file),
        found=shortened(found),
        expected=expected,
        remedy=FIT_ANEW,
    )


def refuse_pairs(checkpoint: Checkpoint, what: str, remedy: str = "call it in Python (docs/translation.md)") -> None:
    """Raise UnsupportedError for a mixture of models with an encoder. `what`: what such a one cannot have, in a sentence.

    Asked first, before any other reason, whose remedies such a mixture could not follow.
    """
    if checkpoint.shape.family.pair:
        raise UnsupportedError(
            what,
            where=str(checkpoint.folder),
            found="it has an encoder",
            expected="a decoder alone",
            remedy=remedy,
        )
