"""Where another library may write: it opens what it is given by name, and follows whatever link lies there.

So it gets a folder that is new (`library_writes`), or one in which everything was found to be modekit's own (`check_own`).
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from modekit.errors import OutputError
from modekit.files.write import disk_errors, make_folder, remove, temporary_in


@contextmanager
def library_writes(folder: Path) -> Iterator[Path]:
    """A new folder that a library writes into; what it wrote moves to `folder` by rename when the block ends well.

    Each file and folder takes the place of what has its name there. Raises OSError, also for what the library makes of a full
    disk.
    """
    make_folder(folder)
    new = temporary_in(folder)
    try:
        with disk_errors(folder):
            new_folder(new)
            yield new
        for path in sorted(new.iterdir()):
            remove(folder / path.name)
            path.rename(folder / path.name)
    finally:
        remove(new)


def new_folder(folder: Path) -> None:
    """Make an empty folder in the place of whatever has its name; of a link, the link goes. Raises OSError."""
    remove(folder)
    folder.mkdir()


def not_own(folder: Path) -> str | None:
    """What in a folder leads out of it, in a line; None where nothing does.

    That is a link, anything that is neither file nor folder, and a file that has another name outside of the folder.
    """
    names: Counter[tuple[int, int]] = Counter()
    links: dict[tuple[int, int], tuple[str, int]] = {}
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent) / name
            said, status = path.relative_to(folder).as_posix(), path.lstat()
            if stat.S_ISLNK(status.st_mode):
                return f"{said} is a link to {path.readlink()}"
            if stat.S_ISDIR(status.st_mode):
                continue
            if not stat.S_ISREG(status.st_mode):
                return f"{said} is no regular file"
            key = status.st_dev, status.st_ino
            names[key] += 1
            links[key] = said, status.st_nlink
    return next((f"{said} has another name elsewhere" for key, (said, count) in links.items() if names[key] < count), None)


def check_own(folder: Path) -> None:
    """Raise OutputError where something in a folder that a library is about to write leads out of it."""
    found = not_own(folder)
    if found is not None:
        raise OutputError(
            "what would be written there would go elsewhere",
            where=str(folder),
            found=found,
            remedy="remove the folder to start over",
        )
