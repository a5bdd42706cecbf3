"""Which files of the base model go into the result as they are: its own, not what links in a stranger's folder point at."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from modekit.errors import SourceError
from modekit.sources.tokenizer import TOKENIZER_FILES

COPIED_FILES = (*TOKENIZER_FILES, "generation_config.json")
"""Of the base, beside the weights."""
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def copied_files(folder: Path, names: Iterable[str], *, where: str) -> tuple[Path, ...]:
    """Those of the files that a model's folder has.

    Raises SourceError for what is no regular file, and for a link that leads out of the folder: what it points at would be
    copied into the result, and published with it. The hub's cache, whose files are links to blobs beside them, is fine.
    """
    found = [folder / name for name in names if (folder / name).is_symlink() or (folder / name).exists()]
    for path in found:
        try:
            target = path.resolve(strict=True)
            problem = None if target.is_file() else "it is no regular file"
        except (OSError, RuntimeError):
            problem = "it is a link to nothing"
        else:
            if not (target.is_relative_to(folder.resolve()) or _is_blob(target, folder)):
                problem = f"it is a link to {target}"
        if problem is not None:
            instead = " in place of the link" if path.is_symlink() else ", or remove what is there"
            raise SourceError(
                "a file that would be copied into the result is not the model's own",
                where=f"{where}: {path.name}",
                found=problem,
                expected="a file in the model's folder",
                remedy=f"put the file itself there{instead}",
            )
    return tuple(found)


def _is_blob(target: Path, folder: Path) -> bool:
    """Whether a file lies where the hub's cache keeps those of a snapshot: snapshots/x links to blobs/hash beside it."""
    snapshot = folder.resolve()
    blobs = snapshot.parents[1] / "blobs" if snapshot.parent.name == "snapshots" else None
    return target.parent == blobs and _BLOB.fullmatch(target.name) is not None
