"""The file of an embedding that carries a router's evidence: the columns that say it are read, or replaced (evidence.py)."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
from blake3 import blake3

from modekit.checkpoint.router_file import Writer
from modekit.files.write import safetensors_header, write_all
from modekit.planning.channels import Channels
from modekit.sources.contents import OpenFiles
from modekit.sources.header import ITEMSIZE, TensorRef
from modekit.weights.numeric import BLOCK


def read_evidence(channels: Channels, embedding: TensorRef) -> memoryview:
    """The columns that an embedding has."""
    itemsize = ITEMSIZE[embedding.dtype]
    height, width = embedding.shape
    first = channels.evidence.start * itemsize
    size = (channels.evidence.stop - channels.evidence.start) * itemsize
    columns = memoryview(bytearray(height * size))
    with OpenFiles() as opened:
        file = opened.file(embedding)
        for row in range(height):  # of a row these few bytes alone are read
            file.fill(columns[row * size : (row + 1) * size], embedding.start + row * width * itemsize + first)
    return columns


def embedding_writer(channels: Channels, embedding: TensorRef, columns: memoryview) -> Writer:
    """Writes the file of an embedding that is there with other evidence."""

    def write(stream: io.FileIO) -> None:
        header = safetensors_header([(embedding.name, embedding.dtype, embedding.shape, embedding.nbytes)])
        write_all(stream, memoryview(header))
        for rows in _changed(channels, embedding, columns):
            write_all(stream, rows)

    return write


def changed_blake3(channels: Channels, embedding: TensorRef, columns: memoryview) -> str:
    """The hash of an embedding that is there with other evidence."""
    digest = blake3()
    for rows in _changed(channels, embedding, columns):
        digest.update(rows)
    return digest.hexdigest()


def _changed(channels: Channels, embedding: TensorRef, columns: memoryview) -> Iterator[memoryview]:
    start, stop = (at * ITEMSIZE[embedding.dtype] for at in (channels.evidence.start, channels.evidence.stop))
    said = np.frombuffer(columns, np.uint8).reshape(embedding.shape[0], stop - start)
    with OpenFiles() as opened:
        for first, rows in rows_of(opened, embedding):
            changed = np.frombuffer(rows, np.uint8).reshape(-1, embedding.shape[1] * ITEMSIZE[embedding.dtype])
            changed[:, start:stop] = said[first : first + len(changed)]
            yield changed.data.cast("B")


def rows_of(opened: OpenFiles, embedding: TensorRef) -> Iterator[tuple[int, memoryview]]:
    """Blocks of whole rows, and the number of the first in each."""
    height, width = embedding.shape
    row = width * ITEMSIZE[embedding.dtype]
    step = max(1, BLOCK // width)
    for start in range(0, height, step):
        yield start, opened.read(embedding, start * row, min(start + step, height) * row)
