"""Whether OUT may be made: what lies there, and what it is made from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from modekit.errors import OutputError, some_of
from modekit.files.marker import foreign_files, read_marker

Replace = Literal["nothing", "modekit's own", "in place"]
"""What may be at OUT: nothing; what modekit wrote, all of it (`--overwrite`); anything, since all of it is carried over."""


def replaced_by(overwrite: bool) -> Replace:
    """What `--overwrite` allows."""
    return "modekit's own" if overwrite else "nothing"


def refuse_what_is_there(out: Path, replace: Replace) -> None:
    """Raise OutputError when something is at OUT that may not be replaced."""
    if not os.path.lexists(out) or replace == "in place":
        return
    if replace == "nothing":
        raise OutputError(
            "the output folder exists",
            where=str(out),
            remedy="choose another folder" + (" or pass --overwrite" if read_marker(out) is not None else ""),
        )
    is_empty = out.is_dir() and not out.is_symlink() and not any(out.iterdir())
    foreign = foreign_files(out) if out.is_dir() and not is_empty else None
    if not is_empty and foreign != []:
        raise OutputError(
            "the output path holds something else than what modekit wrote there, so it is not overwritten",
            where=str(out),
            found=some_of(foreign, 5) if foreign else "no .modekit, which every folder that modekit makes has",
            remedy="move it away, or choose another folder",
        )


def refuse_entangled(out: Path, sources: Sequence[Path]) -> None:
    """Raise OutputError when OUT is, holds, or lies in a folder that the command reads, whatever links lead there."""
    real = Path(os.path.realpath(out))  # Path.resolve raises where links go round
    for folder in (Path(os.path.realpath(source)) for source in sources):
        if real == folder or real in folder.parents or folder in real.parents:
            raise OutputError(
                "the output must not touch what it is made from",
                where=str(out),
                found=f"it is, holds or lies in {folder}",
                remedy="choose a folder beside it",
            )
