"""Weight files that shrink, change, are replaced or cannot be read while they are read: an error that names the file."""

from __future__ import annotations

import errno
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3

from damage import other_bytes
from modekit.errors import SourceError
from modekit.files.staging import safetensors_header
from modekit.sources.contents import CHUNK, OpenFiles, blake3_of
from modekit.sources.header import TensorRef, read_header
from modekit.weights.stored import Stored, same_bytes

COUNT = 3 * CHUNK // 4 + 5


@pytest.fixture
def ref(tmp_path: Path) -> TensorRef:
    """A tensor of some chunks, alone in its file."""
    path = tmp_path / "model.safetensors"
    values = np.random.default_rng(0).standard_normal(COUNT).astype(np.float32)
    path.write_bytes(safetensors_header([("w", "F32", (COUNT,), values.nbytes)]) + values.tobytes())
    return read_header(path, where="test")["w"]


def replaced(path: Path) -> None:
    """Another file of the same length and time under the name."""
    shutil.copy2(path, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


CHANGES = [other_bytes, replaced, truncated]


def test_all_and_any_part_of_a_tensor_are_its_bytes(ref: TensorRef) -> None:
    whole = ref.file.read_bytes()[ref.start : ref.end]
    numbers = np.frombuffer(whole, np.float32)
    with OpenFiles() as opened:
        assert bytes(opened.read(ref)) == whole
        assert bytes(opened.read(ref, 8, 24)) == whole[8:24]
        chunks = [bytes(chunk) for chunk in opened.chunks(ref)]
        assert b"".join(chunks) == whole and {len(chunk) for chunk in chunks[:-1]} == {CHUNK}
        stored = Stored(opened, ref)
        for part in (slice(0, 7), slice(COUNT - 3, COUNT + 9), slice(5, 5), slice(9, 4), slice(None)):
            assert np.array_equal(stored[part], numbers[part])
        assert len(stored) == COUNT
        assert same_bytes(opened, ref, ref)
    assert blake3_of(ref.file) == blake3(ref.file.read_bytes()).hexdigest()


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changed_since_its_header_was_read(ref: TensorRef, change: Callable[[Path], None]) -> None:
    change(ref.file)
    with pytest.raises(SourceError, match="has changed since its header was read") as error, OpenFiles() as opened:
        opened.read(ref)
    assert error.value.where == str(ref.file)


@pytest.mark.parametrize("change", [other_bytes, truncated])
def test_a_file_that_changes_while_it_is_read(ref: TensorRef, change: Callable[[Path], None]) -> None:
    with pytest.raises(SourceError, match="has changed since"), OpenFiles() as opened:
        opened.read(ref, 0, 4)
        change(ref.file)


def test_a_file_that_ends_early_while_it_is_read(ref: TensorRef) -> None:
    """It was a memory map, and the process was killed (SIGBUS) without a word."""
    with pytest.raises(SourceError, match="became shorter"), OpenFiles() as opened:
        for _ in opened.chunks(ref):
            os.truncate(ref.file, CHUNK + 100)


def test_a_file_that_ends_early_while_it_is_hashed(ref: TensorRef) -> None:
    with pytest.raises(SourceError, match="became shorter"):
        blake3_of(ref.file, lambda done, total: os.truncate(ref.file, CHUNK + 100))


def test_a_file_replaced_under_an_open_one_stays_what_it_was(ref: TensorRef) -> None:
    before = ref.file.read_bytes()[ref.start : ref.end]
    with OpenFiles() as opened:
        opened.read(ref, 0, 4)
        ref.file.with_suffix(".new").write_bytes(bytes(ref.end))
        ref.file.with_suffix(".new").replace(ref.file)
        assert bytes(opened.read(ref)) == before


def test_a_disk_that_cannot_be_read(ref: TensorRef, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(io.FileIO):
        def readinto(self, _: object) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("modekit.sources.contents.open_regular", Broken)
    with pytest.raises(SourceError, match="cannot be read") as error, OpenFiles() as opened:
        opened.read(ref)
    assert error.value.where == str(ref.file) and error.value.found == os.strerror(errno.EIO)


@pytest.mark.parametrize("there", [True, False])
def test_neither_a_pipe_nor_nothing_is_waited_for(ref: TensorRef, there: bool) -> None:
    ref.file.unlink()
    if there:
        os.mkfifo(ref.file)
    with pytest.raises(SourceError, match="cannot be read"), OpenFiles() as opened:
        opened.read(ref)
