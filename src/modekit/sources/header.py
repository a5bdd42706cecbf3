"""A tensor in a safetensors file: which, and where its bytes lie (contents.py reads them); and what the file was then."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from modekit.errors import SourceError

ITEMSIZE = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 1),
}
DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""safetensors name -> name used in recipes and config.json; the dtypes a mixture can be built from."""


@dataclass(frozen=True)
class FileState:
    """What a file was when it was looked at: another state is another file, or other bytes.

    `changed_ns` also changes with a new name or mode of the file, but nobody can put it back: it counts where a later
    process asks whether these are still the same bytes.
    """

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int = field(compare=False)

    @classmethod
    def of(cls, file: io.FileIO | Path) -> FileState:
        """The state of a file, open or not. Raises OSError."""
        found = file.stat() if isinstance(file, Path) else os.fstat(file.fileno())
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


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


def check_floats(refs: Iterable[TensorRef], *, where: str) -> None:
    """Raise SourceError for a tensor of no float."""
    for ref in (each for each in refs if each.dtype not in DTYPE_NAMES):
        raise SourceError(
            "tensor dtype cannot be mixed",
            where=f"{where}: {ref.name}",
            found=ref.dtype,
            expected=", ".join(DTYPE_NAMES),
            remedy="save it in bf16, fp16 or fp32",
        )
