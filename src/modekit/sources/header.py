"""The header of a safetensors file: which tensors, and where their bytes lie (contents.py reads these).

8 bytes of its length (little endian), JSON with dtype, shape and data_offsets per tensor, then the data. The safetensors
library checks files on this disk; of headers on the hub each tensor's bytes are compared with its shape.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from modekit.errors import SourceError
from modekit.files.read import FileState, open_regular, parse_json

ITEMSIZE = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 1),
}
DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""safetensors name -> name used in recipes and config.json; the dtypes a mixture can be built from."""
LARGEST_HEADER = 2**25  # bytes: a quarter of a million tensors
_AGAIN = "download or save the file again"


@dataclass(frozen=True)
class TensorRef:
    """A tensor in a file: safetensors dtype, shape, and the absolute byte range [start, end).

    `state` is the file's when its header was read; None where the header is not of a file on this disk.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    state: FileState | None = field(default=None, compare=False, repr=False)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.end - self.start

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def parts(self) -> tuple[TensorRef, ...]:
        """The tensors in its model's files that are read for it: itself, but for quantised and joined ones."""
        return (self,)

    @property
    def source_dtype(self) -> str:
        """The dtype that it gets where a recipe says `dtype: source`."""
        return self.dtype


def read_header(file: Path, *, where: str) -> dict[str, TensorRef]:
    """Tensors of one safetensors file. Raises SourceError for a file that the safetensors library does not open."""
    from safetensors import SafetensorError, safe_open

    where = f"{where}: {file.name}"
    try:
        with open_regular(file) as raw:
            state = FileState.of(raw)
            with safe_open(file, framework="numpy"):
                return tensors_in(io.BufferedReader(raw), state.size, file, where=where, state=state)
    except OSError as error:
        raise SourceError("file cannot be read", where=where, found=error.strerror or error, remedy=_AGAIN) from None
    except SafetensorError as error:
        raise SourceError("safetensors file is damaged, or none", where=where, found=error, remedy=_AGAIN) from None


def tensors_in(stream: BinaryIO, size: int, file: Path, *, where: str, state: FileState | None = None) -> dict[str, TensorRef]:
    """The same of a stream that begins as a file of `size` bytes does; of it no more than the header is read."""
    try:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > min(size - 8, LARGEST_HEADER):
            raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
        header = parse_json(stream.read(length).decode("utf-8"), once=True)
        header.pop("__metadata__", None)
        found = {name: _tensor(name, said, 8 + length, file, state) for name, said in header.items()}
        lies = next((ref for ref in found.values() if not _is_possible(ref, 8 + length, size)), None)
        if lies is not None:
            raise ValueError(
                f"{lies.name[:200]}: {lies.dtype} {list(lies.shape)} at bytes {lies.start} to {lies.end} of {size:,}"
            )
    except (struct.error, KeyError, TypeError, ValueError, AttributeError) as error:
        raise SourceError("safetensors file is damaged, or none", where=where, found=error, remedy=_AGAIN) from None
    return found


def _tensor(name: str, said: Mapping[str, Any], data_start: int, file: Path, state: FileState | None) -> TensorRef:
    begin, end = said["data_offsets"]
    return TensorRef(name, file, said["dtype"], tuple(said["shape"]), data_start + begin, data_start + end, state)


def _is_possible(ref: TensorRef, data_start: int, size: int) -> bool:
    counts = all(type(number) is int and 0 <= number < 2**50 for number in (*ref.shape, ref.start, ref.end))
    return (
        counts
        and data_start <= ref.start <= ref.end <= size
        and (ref.dtype not in ITEMSIZE or ref.nbytes == ref.numel * ITEMSIZE[ref.dtype])
    )


def check_floats(refs: Iterable[TensorRef], *, where: str) -> None:
    """Raise SourceError for a tensor of no float."""
    for ref in refs:
        if ref.dtype not in DTYPE_NAMES:
            raise SourceError(
                "tensor dtype cannot be mixed",
                where=f"{where}: {ref.name}",
                found=ref.dtype,
                expected=", ".join(DTYPE_NAMES),
                remedy="save it in bf16, fp16 or fp32",
            )
