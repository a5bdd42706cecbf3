"""Flat arrays of numbers that are read, or computed, where they are asked for: memory is what is asked for at a time."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np
import numpy.typing as npt

from modekit.sources.contents import OpenFiles
from modekit.sources.model import ITEMSIZE, TensorRef
from modekit.weights.numeric import as_array, is_finite


class FlatArray(Protocol):
    """A flat array, or something that is read like one, in slices with a step of one."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> npt.NDArray[np.generic]: ...


class Stored:
    """A tensor on disk as a flat array of its own dtype: `len(stored)`, `stored[start:stop]`. Reading raises SourceError."""

    def __init__(self, opened: OpenFiles, ref: TensorRef) -> None:
        self._opened, self._ref = opened, ref
        self._itemsize = ITEMSIZE[ref.dtype]

    def __len__(self) -> int:
        return self._ref.numel

    def __getitem__(self, part: slice) -> npt.NDArray[np.generic]:
        start, stop, step = part.indices(len(self))
        if step != 1:
            raise ValueError(f"a stored tensor is read in order, not by steps of {step}")
        read = self._opened.read(self._ref, start * self._itemsize, max(start, stop) * self._itemsize)
        return as_array(read, self._ref.dtype)


def holds_only_finite(opened: OpenFiles, ref: TensorRef) -> bool:
    """Whether a tensor on disk has neither NaN nor Inf. Raises SourceError when it cannot be read."""
    return all(is_finite(chunk, ref.dtype) for chunk in opened.chunks(ref))


def same_bytes(opened: OpenFiles, first: TensorRef, second: TensorRef) -> bool:
    """Whether two tensors on disk, of whatever dtype and shape, are the same bytes. Raises SourceError as above."""
    if first.nbytes != second.nbytes:
        return False
    pairs = zip(opened.chunks(first), opened.chunks(second), strict=True)
    return all(np.array_equal(np.frombuffer(one, np.uint8), np.frombuffer(other, np.uint8)) for one, other in pairs)


def span_of(ref: TensorRef, start: int, stop: int) -> TensorRef:
    """Some bytes of a tensor, as if they were a tensor: what `same_bytes` and `chunks` need to know of one."""
    return dataclasses.replace(ref, dtype="U8", shape=(stop - start,), start=ref.start + start, end=ref.start + stop)
