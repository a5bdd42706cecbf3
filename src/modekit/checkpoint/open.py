"""A checkpoint folder, opened."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.record import RECORD_FILE, MixtureRecord
from modekit.errors import CheckpointError, UnsupportedError
from modekit.files.change import finish_change
from modekit.files.mending import is_in_the_making, mend
from modekit.files.read import UNREADABLE, read_json
from modekit.files.typed import as_kind, shortened
from modekit.planning.shape import BUILD_AGAIN


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint's record, config, headers and router file.

    Raises CheckpointError when the folder is none, damaged or of another format, or its router is not the one that it
    records; SourceError when a shard is damaged.
    """
    checkpoint = open_with_any_router(folder)
    checkpoint.check_router()
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


def refuse_pairs(checkpoint: Checkpoint, what: str, remedy: str = "call it in Python (docs/translation.md)") -> None:
    """Raise UnsupportedError for a mixture of models with an encoder. `what`: what such a one cannot have, in a sentence.

    Asked first, before any other reason, whose remedies such a mixture could not follow.
    """
    if checkpoint.shape.family.pair:
        where = str(checkpoint.folder)
        raise UnsupportedError(what, where=where, found="it has an encoder", expected="a decoder alone", remedy=remedy)
