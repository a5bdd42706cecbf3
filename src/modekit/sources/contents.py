"""Weight files: their headers, and their bytes, which others may change at any moment: read into memory, never mapped.

A safetensors header is 8 bytes of its length (little endian), JSON with dtype, shape and data_offsets per tensor, then the
data. The safetensors library checks them.

A map of a file that becomes shorter kills the process that looks at it, without a word (SIGBUS), and the pages that it has
looked at count as its memory. What is read is held by whoever reads it, and no longer. A file that is not in the state in
which its header was read is refused, so that what is copied, what is hashed and what was planned are the same bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from blake3 import blake3

from modekit.errors import SourceError
from modekit.files.json import parse_json
from modekit.files.read import open_regular
from modekit.sources.header import FileState, TensorRef
from modekit.sources.quantised import PackedRef

CHUNK = 2**19
"""Bytes read at a time where a whole file or tensor goes by: they stay in the processor's cache while they are looked at."""

_ALONE = "leave the models alone while they are read, and run the command again"
_AGAIN = "download or save the file again"
_CHANGED = "a weight file has changed since its header was read"


def read_header(file: Path, *, where: str) -> dict[str, TensorRef]:
    """Tensors of one safetensors file. Raises SourceError for a file that the safetensors library does not open."""
    from safetensors import SafetensorError, safe_open

    where = f"{where}: {file.name}"
    try:
        with open_regular(file) as raw, safe_open(file, framework="numpy"):
            state = FileState.of(raw)
            (length,) = struct.unpack("<Q", raw.read(8))
            header = parse_json(raw.read(length).decode("utf-8"))
            header.pop("__metadata__", None)
            found: dict[str, TensorRef] = {}
            for name, said in header.items():
                begin, end = (8 + length + offset for offset in said["data_offsets"])
                found[name] = TensorRef(name, file, said["dtype"], tuple(said["shape"]), begin, end, state)
            return found
    except OSError as error:
        raise SourceError("file cannot be read", where=where, found=error.strerror or error, remedy=_AGAIN) from None
    except (SafetensorError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError("safetensors file is damaged, or none", where=where, found=error, remedy=_AGAIN) from None


class WeightFile:
    """One file, open for reading by one thread. With `planned`, it must be in that state.

    Everything here raises SourceError: a file that cannot be read, ends early or has changed.
    """

    def __init__(self, path: Path, planned: FileState | None = None) -> None:
        self.path = path
        try:
            self.stream = open_regular(path)
            self.state = FileState.of(self.stream)
        except OSError as error:
            raise self._unreadable(error) from None
        if planned is not None and planned != self.state:
            self.stream.close()
            raise self._error(_CHANGED)

    def fill(self, buffer: memoryview, position: int) -> None:
        """Fill a buffer from a place in the file; other threads run meanwhile."""
        try:
            self.stream.seek(position)
            while len(buffer):
                count = self.stream.readinto(buffer)
                if not count:
                    raise self.ended()
                buffer = buffer[count:]
        except OSError as error:
            raise self._unreadable(error) from None

    def chunks(self, start: int, end: int) -> Iterator[memoryview]:
        """The bytes [start, end) in order. Each chunk lies in the same memory as the one before it."""
        buffer = memoryview(bytearray(min(CHUNK, max(0, end - start))))
        for position in range(start, end, CHUNK):
            chunk = buffer[: min(CHUNK, end - position)]
            self.fill(chunk, position)
            yield chunk

    def check_unchanged(self) -> None:
        """To be called when all has been read: whether it is still the file that was opened."""
        try:
            state = FileState.of(self.stream)
        except OSError as error:
            raise self._unreadable(error) from None
        if state != self.state:
            raise self._error(_CHANGED)

    def close(self) -> None:
        """Release the file."""
        self.stream.close()

    def ended(self) -> SourceError:
        """What to raise when there are fewer bytes than its header said."""
        return self._error("a weight file became shorter while it was read")

    def _unreadable(self, error: OSError) -> SourceError:
        return self._error(
            "a weight file cannot be read",
            error.strerror or error,
            "put it back, make it readable, or mend the disk",
        )

    def _error(self, what: str, found: object = None, remedy: str = _ALONE) -> SourceError:
        return SourceError(what, where=str(self.path), found=found, remedy=remedy)


class OpenFiles:
    """The files of the tensors that one thread reads, opened on first use and closed together.

    As a context, it makes sure at a good end that no file has changed meanwhile. Raises SourceError, as `WeightFile` does.
    """

    def __init__(self) -> None:
        self._files: dict[Path, WeightFile] = {}
        # Whole parts of the packed tensors at hand, which are read block by block.
        self._parts: dict[TensorRef, memoryview] = {}

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            for file in self._files.values() if kind is None else ():
                file.check_unchanged()
        finally:
            self.close()

    def file(self, ref: TensorRef) -> WeightFile:
        """The file that holds a tensor."""
        if ref.file not in self._files:
            self._files[ref.file] = WeightFile(ref.file, ref.state)
        return self._files[ref.file]

    def read(self, ref: TensorRef, start: int = 0, stop: int | None = None) -> memoryview:
        """A tensor's bytes, or those from `start` to `stop` of them, in memory of their own.

        Of a packed tensor, those of its numbers in float32.
        """
        stop = ref.nbytes if stop is None else stop
        if isinstance(ref, PackedRef):
            return ref.unpacked(self._read_part, start, stop)
        buffer: memoryview = np.empty(stop - start, np.uint8).data
        self.file(ref).fill(buffer, ref.start + start)
        return buffer

    def chunks(self, ref: TensorRef) -> Iterator[memoryview]:
        """A tensor's bytes in order, in whole elements. Each chunk may lie in the same memory as the one before it."""
        if isinstance(ref, PackedRef):
            return (self.read(ref, start, min(start + CHUNK, ref.nbytes)) for start in range(0, ref.nbytes, CHUNK))
        return self.file(ref).chunks(ref.start, ref.end)

    def _read_part(self, ref: TensorRef, start: int, stop: int) -> memoryview:
        if (start, stop) != (0, ref.nbytes):
            return self.read(ref, start, stop)
        if ref not in self._parts:
            if len(self._parts) >= 8:  # of one quantised tensor there are six at most
                self._parts.clear()
            self._parts[ref] = self.read(ref)
        return self._parts[ref]

    def blake3(self, ref: TensorRef) -> str:
        """A tensor's hash."""
        digest = blake3()
        for chunk in self.chunks(ref):
            digest.update(chunk)
        return str(digest.hexdigest())

    def close(self) -> None:
        """Release all files."""
        for file in self._files.values():
            file.close()
        self._files.clear()
