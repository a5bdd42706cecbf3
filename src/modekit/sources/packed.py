"""Tensors that files hold in a few bits per number: what each form computes from its parts, block by block, in float32.

A `PackedRef` is read like any tensor (contents.py); which form a model's tensors have says quantised.py, or gguf.py.

Shape legend: O, I rows and columns of a weight; G groups of columns with a scale of their own; N rows asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

from modekit.sources.model import TensorRef

Read = Callable[[TensorRef, int, int], memoryview]
"""Bytes [start, stop) of a tensor in a file."""
Array32 = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

NUMBERS: dict[str, np.dtype[np.generic]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "I32": np.dtype(np.int32),
}
"""Of the dtypes that parts have."""
_AWQ_PLACES = np.array([0, 4, 1, 5, 2, 6, 3, 7])
"""In which four bits of a word AWQ's eight numbers lie."""


@dataclass(frozen=True, kw_only=True)
class PackedRef(TensorRef):
    """A tensor that is computed where it is read. `start` and `end` count bytes of its numbers in float32.

    `written`: the safetensors dtype that it gets where a recipe says `dtype: source`.
    """

    form: Form
    written: str

    @classmethod
    def of(cls, name: str, shape: tuple[int, ...], form: Form, written: str) -> PackedRef:
        """The whole tensor."""
        count = math.prod(shape)
        first = form.parts[0]
        return cls(name, first.file, "F32", shape, 0, 4 * count, first.state, form=form, written=written)

    @property
    def parts(self) -> tuple[TensorRef, ...]:
        """The tensors in files that it is computed from."""
        return self.form.parts

    @property
    def source_dtype(self) -> str:
        """That of the model."""
        return self.written

    def unpacked(self, read: Read, start: int, stop: int) -> memoryview:
        """Bytes [start, stop) of its own in float32."""
        start, stop, size = self.start + start, self.start + stop, 4 * self.form.unit
        first = start // size
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is found and named by who reads it
            values = self.form.values(read, first, -(-stop // size))
        found: memoryview = (
            np.ascontiguousarray(values, np.float32).view(np.uint8).data[start - first * size : stop - first * size]
        )
        return found


def numbers(read: Read, ref: TensorRef, first: int = 0, last: int | None = None) -> npt.NDArray[np.generic]:
    """Rows of a tensor in a file, in its own dtype."""
    last = (ref.shape[0] if ref.shape else 1) if last is None else last
    row = ref.nbytes // max(1, ref.shape[0] if ref.shape else 1)
    return np.frombuffer(read(ref, first * row, last * row), NUMBERS[ref.dtype]).reshape(-1, *ref.shape[1:])


@dataclass(frozen=True)
class Scaled:
    """Small floats or integers with a scale per block: W = (Q - zero) * scale * factor.

    DeepSeek's and Qwen's fp8 (a scale per 128 x 128), fp8 per row or tensor, bitsandbytes' 8 bits (factor 1 / 127).
    """

    weight: TensorRef
    scale: TensorRef
    block: tuple[int, int]
    factor: float = 1.0
    zero: TensorRef | None = None

    @property
    def parts(self) -> tuple[TensorRef, ...]:
        """Weight, scale, zero."""
        return (self.weight, self.scale, *((self.zero,) if self.zero is not None else ()))

    @property
    def unit(self) -> int:
        """A row."""
        return self.weight.shape[1]

    def values(self, read: Read, first: int, last: int) -> Array32:
        """Rows first to last."""
        found = numbers(read, self.weight, first, last).astype(np.float32)
        rows, columns = np.arange(first, last) // self.block[0], np.arange(self.unit) // self.block[1]
        blocks = -(-self.weight.shape[0] // self.block[0])  # above each other

        def repeated(ref: TensorRef) -> Array32:
            grid = numbers(read, ref).astype(np.float32).reshape(blocks, -1)
            return grid[rows][:, columns] if grid.shape[1] > 1 else grid[rows]

        if self.zero is not None:
            found -= repeated(self.zero)
        found *= repeated(self.scale) * np.float32(self.factor)
        return found.ravel()


@dataclass(frozen=True)
class DoubleQuantised:
    """The scales of `Coded` in bytes: absmax = code[byte] * scale of its block + offset."""

    scale: TensorRef
    code: TensorRef
    block: int
    offset: float


@dataclass(frozen=True)
class Coded:
    """bitsandbytes' nf4 and fp4: an index into 16 numbers per element, and the largest number of each block.

    W = code[index] * absmax, by bitsandbytes' dequantize_4bit; of two in a byte the first lies in the upper half.
    """

    weight: TensorRef
    absmax: TensorRef
    code: TensorRef
    block: int
    shape: tuple[int, int]
    nested: DoubleQuantised | None = None

    @property
    def parts(self) -> tuple[TensorRef, ...]:
        """Weight, absmax, code, and those of the absmax."""
        return (
            self.weight,
            self.absmax,
            self.code,
            *((self.nested.scale, self.nested.code) if self.nested is not None else ()),
        )

    @property
    def unit(self) -> int:
        """A block."""
        return self.block

    def values(self, read: Read, first: int, last: int) -> Array32:
        """Blocks first to last."""
        start, stop = first * self.block, min(last * self.block, math.prod(self.shape))
        packed = np.frombuffer(read(self.weight, start // 2, -(-stop // 2)), np.uint8)
        index = np.stack([packed >> 4, packed & 15], axis=1).ravel()[: stop - start]
        found = numbers(read, self.code).astype(np.float32)[index]
        found *= np.repeat(self._absmax(read, first, last), self.block)[: stop - start]
        return np.asarray(found)

    def _absmax(self, read: Read, first: int, last: int) -> Array32:
        given, nested = numbers(read, self.absmax, first, last), self.nested
        if nested is None:
            return given.astype(np.float32)
        scales = numbers(read, nested.scale).astype(np.float32)[np.arange(first, last) // nested.block]
        return np.asarray(
            numbers(read, nested.code).astype(np.float32)[given.astype(np.int64)] * scales + np.float32(nested.offset)
        )


@dataclass(frozen=True)
class Words:
    """Integers of a few bits in words of 32, with a scale and a zero per group of columns: W = (Q - zero) * scale.

    gptq: weight (I bits/32, O) and scales (G, O), zeros less one where `shift` is 1. awq: weight (I, O bits/32), the eight
    numbers of a word out of order. compressed (compressed-tensors' pack-quantized): weight (O, I bits/32), scales (O, G),
    signed numbers.
    """

    layout: Literal["gptq", "awq", "compressed"]
    shape: tuple[int, int]
    bits: int
    group: int
    weight: TensorRef
    scales: TensorRef
    zeros: TensorRef | None = None
    groups: TensorRef | None = None
    shift: int = 0

    @property
    def parts(self) -> tuple[TensorRef, ...]:
        """Weight, scales, zeros, and the group of each column."""
        return tuple(ref for ref in (self.weight, self.scales, self.zeros, self.groups) if ref is not None)

    @property
    def unit(self) -> int:
        """A row."""
        return self.shape[1]

    def values(self, read: Read, first: int, last: int) -> Array32:
        """Rows first to last."""
        rows, columns = slice(first, last), self.shape[1]
        words, scales_NG = numbers(read, self.weight), numbers(read, self.scales).astype(np.float32)
        if self.layout == "compressed":
            quants_NI = _stream(words[rows], self.bits, columns) - 2 ** (self.bits - 1)
            scales_NG = scales_NG[rows]
        else:
            scales_NG = scales_NG[:, rows].T
            quants_NI = self._across(words, rows) if self.layout == "awq" else _stream(words[:, rows].T, self.bits, columns)
        group_I = np.arange(columns) // self.group
        if self.groups is not None:
            group_I = numbers(read, self.groups).astype(np.int64) % scales_NG.shape[1]
        if self.zeros is not None:
            quants_NI = quants_NI - self._zeros(numbers(read, self.zeros), rows)[:, group_I]
        return np.asarray(quants_NI.astype(np.float32) * scales_NG[:, group_I]).ravel()

    def _zeros(self, words: npt.NDArray[np.generic], rows: slice) -> Integers:
        """(N, G)."""
        if self.layout == "compressed":
            return np.asarray(self._across(words.T, rows) - 2 ** (self.bits - 1))
        return np.asarray(self._across(words, rows) + self.shift)

    def _across(self, words: npt.NDArray[np.generic], rows: slice) -> Integers:
        """Of words (X, O bits/32) with one row's numbers beside the other's, those of these rows: (N, X)."""
        start = rows.start // 32 * 32  # where a number begins with a word, whatever the bits
        found = _stream(words[:, start * self.bits // 32 : -(-rows.stop * self.bits // 32)], self.bits, None)
        if self.layout == "awq":
            found = found.reshape(len(found), -1, 8)[:, :, _AWQ_PLACES].reshape(len(found), -1)
        return np.asarray(found[:, rows.start - start : rows.stop - start].T)


def _stream(words: npt.NDArray[np.generic], bits: int, count: int | None) -> Integers:
    """Numbers of a few bits that follow each other from the lowest bit on, across the words of a row (GPTQ's 3 bits do)."""
    count = words.shape[1] * 32 // bits if count is None else count
    place = np.arange(count) * bits
    wide = np.pad(np.ascontiguousarray(words).view(np.uint32), ((0, 0), (0, 1))).astype(np.uint64)
    both = wide[:, :-1] | (wide[:, 1:] << np.uint64(32))
    found = (both[:, place // 32] >> (place % 32).astype(np.uint64)) & np.uint64(2**bits - 1)
    return np.asarray(found.astype(np.int64))


@dataclass(frozen=True)
class Ggml:
    """A tensor of a GGUF, by the gguf package's own dequantiser.

    Attributes:
        data: its bytes, one row (of blocks) after the other.
        kind: number of the type in ggml.
        columns: elements of a row.
        order: the rows as transformers wants them; None as they are.
        finish: what transformers makes of the whole tensor, in place of `order`.
    """

    data: TensorRef
    kind: int
    shape: tuple[int, ...]
    order: npt.NDArray[np.int64] | None = field(default=None, compare=False)
    finish: Callable[[Array32], Array32] | None = field(default=None, compare=False)

    @property
    def parts(self) -> tuple[TensorRef, ...]:
        """Its bytes."""
        return (self.data,)

    @property
    def unit(self) -> int:
        """A row, or everything."""
        return math.prod(self.shape) if self.finish is not None else self.shape[-1]

    def values(self, read: Read, first: int, last: int) -> Array32:
        """Rows first to last; numbers that a damaged file makes NaN or Inf are found where they are read."""
        if self.finish is not None:
            whole = self._rows(read, 0, math.prod(self.shape[:-1]))
            return np.asarray(self.finish(whole.reshape(self.shape))).ravel()
        if self.order is None:
            return self._rows(read, first, last).ravel()
        taken = self.order[first:last]
        start = int(taken.min())
        return np.asarray(self._rows(read, start, int(taken.max()) + 1)[taken - start]).ravel()

    def _rows(self, read: Read, first: int, last: int) -> Array32:
        from gguf import GGMLQuantizationType, dequantize  # of an extra

        row = self.data.nbytes // max(1, math.prod(self.shape[:-1]))
        packed = np.frombuffer(read(self.data, first * row, last * row), np.uint8).reshape(last - first, row)
        return np.asarray(dequantize(packed, GGMLQuantizationType(self.kind)), np.float32).reshape(last - first, -1)


Form: TypeAlias = Scaled | Coded | Words | Ggml
"""How the numbers of one tensor follow from others in the files, its `parts`: by units of elements that are computed together.
`values` are those of some units, flat; of the last unit as many as there are.
"""
