"""Weight files: whole, in parts, and replaced while they are open; building/test_changing_sources.py has those that change."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3

from modekit.errors import SourceError
from modekit.files.staging import safetensors_header
from modekit.sources.contents import CHUNK, OpenFiles, read_header
from modekit.sources.digests import blake3_of
from modekit.sources.header import TensorRef
from modekit.weights.flat import same_bytes, stored

COUNT = 3 * CHUNK // 4 + 5


@pytest.fixture
def ref(tmp_path: Path) -> TensorRef:
    """A tensor of some chunks, alone in its file."""
    path = tmp_path / "model.safetensors"
    values = np.random.default_rng(0).standard_normal(COUNT).astype(np.float32)
    path.write_bytes(safetensors_header([("w", "F32", (COUNT,), values.nbytes)]) + values.tobytes())
    return read_header(path, where="test")["w"]


def test_all_and_any_part_of_a_tensor_are_its_bytes(ref: TensorRef) -> None:
    whole = ref.file.read_bytes()[ref.start : ref.end]
    numbers = np.frombuffer(whole, np.float32)
    with OpenFiles() as opened:
        assert bytes(opened.read(ref)) == whole
        assert bytes(opened.read(ref, 8, 24)) == whole[8:24]
        chunks = [bytes(chunk) for chunk in opened.chunks(ref)]
        assert b"".join(chunks) == whole and {len(chunk) for chunk in chunks[:-1]} == {CHUNK}
        found = stored(opened, ref)
        for part in (slice(0, 7), slice(COUNT - 3, COUNT + 9), slice(5, 5), slice(9, 4), slice(None)):
            assert np.array_equal(found[part], numbers[part])
        assert len(found) == COUNT
        assert same_bytes(opened, ref, ref)
    assert blake3_of(ref.file) == blake3(ref.file.read_bytes()).hexdigest()


def test_a_file_replaced_under_an_open_one_stays_what_it_was(ref: TensorRef) -> None:
    before = ref.file.read_bytes()[ref.start : ref.end]
    with OpenFiles() as opened:
        opened.read(ref, 0, 4)
        ref.file.with_suffix(".new").write_bytes(bytes(ref.end))
        ref.file.with_suffix(".new").replace(ref.file)
        assert bytes(opened.read(ref)) == before


@pytest.mark.parametrize("there", [True, False])
def test_neither_a_pipe_nor_nothing_is_waited_for(ref: TensorRef, there: bool) -> None:
    ref.file.unlink()
    if there:
        os.mkfifo(ref.file)
    with pytest.raises(SourceError, match="cannot be read"), OpenFiles() as opened:
        opened.read(ref)
