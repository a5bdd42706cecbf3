"""The header of a safetensors file: which tensors, and where their bytes lie (contents.py reads these).

8 bytes of its length (little endian), JSON with dtype, shape and data_offsets per tensor, then the data. The safetensors
library checks them.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
_AGAIN = "download or save the file again"


@dataclass(frozen=True)
class TensorRef:
    """A tensor in a file: safetensors dtype, shape, and the absolute byte range [start, end).

    `state` is the file's when its header was read; None where it was not read.
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
        with open_regular(file) as raw, safe_open(file, framework="numpy"):
            state = FileState.of(raw)
            (length,) = struct.unpack("<Q", raw.read(8))
            header = parse_json(raw.read(length).decode("utf-8"))
            header.pop("__metadata__", None)
            return {name: _tensor(name, said, 8 + length, file, state) for name, said in header.items()}
    except OSError as error:
        raise SourceError("file cannot be read", where=where, found=error.strerror or error, remedy=_AGAIN) from None
    except (SafetensorError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError("safetensors file is damaged, or none", where=where, found=error, remedy=_AGAIN) from None


def _tensor(name: str, said: Mapping[str, Any], data_start: int, file: Path, state: FileState) -> TensorRef:
    begin, end = said["data_offsets"]
    return TensorRef(name, file, said["dtype"], tuple(said["shape"]), data_start + begin, data_start + end, state)


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
