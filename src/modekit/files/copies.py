"""Files copied or linked, what another library writes, and what kills left of either."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from modekit.files.read import open_regular
from modekit.files.write import appearing, create, files_below, is_temporary, make_folder, remove, temporary_in

_TORCH_WRITES = re.compile(r"PytorchStreamWriter|inline_container|unexpected pos")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Around a library that writes `path` for us: what it makes of a full disk, in classes of its own, is an OSError again.

    safetensors raises SafetensorError and tokenizers Exception with the system's words, torch's writer RuntimeError with words
    of its own.
    """
    try:
        yield
    except Exception as error:
        number = re.search(r"os error (\d+)", str(error))
        torch_writes = isinstance(error, RuntimeError) and _TORCH_WRITES.search(str(error))
        if not (number and type(error).__name__ in ("SafetensorError", "Exception")) and not torch_writes:
            raise
        code = int(number[1]) if number else errno.EIO
        raise OSError(
            code,
            os.strerror(code) if number else "a file could not be written whole: is the disk full?",
            str(path),
        ) from None


@contextmanager
def library_writes(folder: Path) -> Iterator[Path]:
    """A new folder that a library writes into; what it wrote moves to `folder` by rename when the block ends well.

    A library follows whatever link lies at a name, so it gets a folder that nobody could foresee. Each file and folder takes
    the place of what has its name. Raises OSError, also for what the library makes of a full disk.
    """
    make_folder(folder)
    new = temporary_in(folder)
    try:
        with disk_errors(folder):
            new.mkdir()
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


def link_in(folder: Path) -> str | None:
    """The first link in a folder that a library is about to write into, in words; None where there is none."""
    links = (folder / name for name in files_below(folder) if (folder / name).is_symlink())
    return next((f"{path.relative_to(folder)} is a link to {path.readlink()}" for path in links), None)


def copy_file(file: Path, target: Path) -> None:
    """Copy a regular file's bytes; the copy appears whole, in place of what has its name. Raises OSError."""
    with open_regular(file) as source, appearing(target, sync=False) as temporary, create(temporary) as stream:
        shutil.copyfileobj(source, stream, 2**20)


def carry_over(folder: Path, target: Path, *, but: Collection[str] = (), links: bool = False) -> None:
    """The regular files of a folder under the same names in another, without copying them where the file system can.

    `but` names entries of the folder that stay behind. With `links`, links are made anew as they are; else they stay, too,
    since what they lead to may be no part of the folder. Raises OSError.
    """
    for name in files_below(folder):
        path = folder / name
        if name.partition("/")[0] in but or is_temporary(path):
            continue
        make_folder((target / name).parent)
        if path.is_symlink():
            if links:
                with appearing(target / name, sync=False) as temporary:
                    temporary.symlink_to(path.readlink())
        elif path.is_file():
            link_file(path, target / name)


def link_file(file: Path, target: Path) -> None:
    """The same bytes under another name, without copying them where the file system can. Raises OSError."""
    if not file.is_symlink():
        with suppress(OSError), appearing(target, sync=False) as temporary:
            remove(target)  # a rename onto another name of the same bytes would do nothing
            os.link(file, temporary)
            return
    copy_file(file, target)


def sweep(folder: Path) -> None:
    """Remove what kills left of things in the making, in a folder that is modekit's and that no other process writes."""
    with suppress(OSError):
        for path in folder.iterdir():
            if is_temporary(path):
                remove(path)
            elif path.is_dir() and not path.is_symlink():
                sweep(path)
