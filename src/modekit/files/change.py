"""Several files of a finished checkpoint change together: all of them or none, whenever the process is killed.

    OUT/.changing   where the new files are written
    OUT/.changed    the same folder once it is whole: this rename is the moment of the change

What a kill leaves of the first is thrown away by the next change; what it leaves of the second is put into place when the
checkpoint is opened next.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

_CHANGING, _CHANGED = ".changing", ".changed"


def change_together(folder: Path, files: Mapping[str, bytes]) -> None:
    """Replace files in a folder, the last one last; each is seen whole. Raises OSError, and then nothing has changed.

    A change that lies there unfinished is dropped: it is finished where a checkpoint is opened, and a build that goes on
    after a kill makes its own anew.
    """
    staged = folder / _CHANGING
    for left in (staged, folder / _CHANGED):
        shutil.rmtree(left, ignore_errors=True)
    try:
        staged.mkdir()
        for name, content in files.items():
            (staged / name).write_bytes(content)
        staged.rename(folder / _CHANGED)
    except OSError:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    _put(folder, list(files))


def finish_change(folder: Path) -> None:
    """Put into place what a killed process left of a change that was whole. Raises OSError."""
    changed = folder / _CHANGED
    if changed.is_dir() and not changed.is_symlink():
        _put(folder, sorted(path.name for path in changed.iterdir()))


def _put(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / _CHANGED / name).replace(folder / name)
    (folder / _CHANGED).rmdir()
