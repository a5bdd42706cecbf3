"""One file or folder appears whole, by rename, or not at all.

    folder/.modekit.<16 hex digits>.tmp    where it is made: nobody could foresee the name, so nobody can have put a link there
    folder/name                            its own name once it is whole

Nothing here follows a link out of a folder that others may have made: a file in the place of another replaces a link and never
writes through it, and a folder is never entered through one. After a power loss, too, a file is there as it was or as it
became: its bytes are on the disk before its name is, and both before the call returns.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import struct
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

_TEMPORARY = re.compile(r"\.modekit\.[0-9a-f]{16}\.tmp")
Entry = tuple[str, str, tuple[int, ...], int]
"""name, safetensors dtype, shape, bytes: one tensor of a file's header."""
_LENGTH, _BOUNDARY = 8, 64
"""Bytes of the header's length in front of it, and what all of it is a multiple of."""
Content = bytes | Callable[[io.FileIO], None]
"""Of a file: its bytes, or what writes them."""
FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
"""What a system says of a disk that takes no more."""


def json_bytes(value: object) -> bytes:
    """Data as indented JSON with a fixed key order."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def digest_of_data(value: object) -> str:
    """sha256 of plain data, the same for the same content."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def safetensors_header(entries: Iterable[Entry]) -> bytes:
    """Header of a safetensors file with the tensors in the given order.

    Data starts on a boundary of 64 bytes, so that a tensor which is read in place lies in memory as one that is copied does:
    on some processors the last bits of a product depend on that.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape, nbytes in entries:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH + len(text)) % _BOUNDARY)
    return struct.pack("<Q", len(text)) + text


def write_all(stream: io.FileIO, view: memoryview) -> None:
    """Write all of a view to an unbuffered stream, however little each call takes."""
    while len(view):
        view = view[stream.write(view) or 0 :]


def create(path: Path) -> io.FileIO:
    """A new file, open for writing, unbuffered. Raises OSError where anything has that name, a link included."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    return io.FileIO(os.open(path, flags, 0o666), "wb")


def make_folder(path: Path) -> None:
    """Make a folder, and those above it. Raises OSError where a link has its name: what is written there would go elsewhere."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, "a link is in the way of a folder", str(path))
    path.mkdir(parents=True, exist_ok=True)


@contextmanager
def appearing(path: Path, *, sync: bool = True) -> Iterator[Path]:
    """A free name beside `path` for a file or folder that takes its place when the block ends well.

    A file replaces what has its name, but for a folder; a folder replaces nothing. Raises OSError.
    """
    temporary = temporary_in(path.parent)
    try:
        yield temporary
        if sync:
            sync_tree(temporary)
        (temporary.rename if temporary.is_dir() else temporary.replace)(path)
    except BaseException as error:
        remove(temporary)
        if isinstance(error, OSError) and (error.errno in FULL or str(error.filename).startswith(str(temporary))):
            error.filename = str(path)  # the file that a user knows
        raise
    if sync:
        sync_folder(path.parent)


def write_file(path: Path, content: Content, *, sync: bool = True) -> None:
    """Write a file so that it is seen whole or not at all. Raises OSError."""
    with appearing(path, sync=sync) as temporary, create(temporary) as stream:
        if isinstance(content, bytes):
            write_all(stream, memoryview(content))
        else:
            content(stream)


def write_json(path: Path, value: object, *, sync: bool = True) -> None:
    """Write data as JSON, as `write_file`."""
    write_file(path, json_bytes(value), sync=sync)


def files_below(folder: Path) -> list[str]:
    """Everything in a folder and its folders that is no folder, by its path with slashes; links are named, not followed."""
    there = (Path(parent) / name for parent, *names in os.walk(folder) for name in chain(*names))
    return sorted(path.relative_to(folder).as_posix() for path in there if path.is_symlink() or not path.is_dir())


def temporary_in(folder: Path) -> Path:
    """A name that nobody could foresee, for something that is yet to be whole."""
    return folder / f".modekit.{secrets.token_hex(8)}.tmp"


def is_temporary(path: Path) -> bool:
    """Whether something bears such a name: a kill may have left it."""
    return _TEMPORARY.fullmatch(path.name) is not None


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it; of a link, the link. What cannot be removed stays."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def remove_if_empty(folder: Path) -> None:
    """Remove a folder unless somebody has put something there."""
    with suppress(OSError):
        folder.rmdir()


def empty_folder(folder: Path, *, but: Collection[str] = ()) -> None:
    """Remove what lies in a folder, but for some names; what cannot be removed stays."""
    with suppress(OSError):
        for path in folder.iterdir() if not folder.is_symlink() else ():
            if path.name not in but:
                remove(path)


def sync_file(path: Path) -> None:
    """Wait until a file's bytes are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


sync_folder = sync_file
"""Wait until the names in a folder are on the disk."""


def sync_tree(path: Path, *, but: Collection[Path] = ()) -> None:
    """Wait until a file, or a folder with all that is in it, is on the disk; `but` for files that are known to be."""
    if not path.is_dir():
        sync_file(path)
        return
    for parent, _, names in os.walk(path, topdown=False):
        for file in (Path(parent) / name for name in names):
            if file not in but and not file.is_symlink():
                sync_file(file)
        sync_folder(Path(parent))
