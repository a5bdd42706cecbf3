"""Raw tensor bytes as numbers: casts between the three float formats (ml_dtypes supplies bfloat16), and a fast exact test for
NaN and Inf.
"""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]
Singles = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
DTYPES: dict[str, np.dtype[np.generic]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
BLOCK = 2**21
"""Elements per block: 8 MiB in float32."""

# An IEEE float is NaN or Inf when all exponent bits are set. Seen as integers, those patterns are the largest of each
# sign, so two maxima (signed for positive values, unsigned for negative ones) decide it without a temporary array.
_BITS: dict[str, tuple[str, str, int, int]] = {
    "F32": ("int32", "uint32", 0x7F800000, 0xFF800000),
    "F16": ("int16", "uint16", 0x7C00, 0xFC00),
    "BF16": ("int16", "uint16", 0x7F80, 0xFF80),
}


def is_finite(view: memoryview, dtype: str) -> bool:
    """Whether every value of a block of F32, F16 or BF16 bytes is finite."""
    if len(view) == 0:
        return True
    signed, unsigned, positive, negative = _BITS[dtype]
    return int(np.frombuffer(view, signed).max()) < positive and int(np.frombuffer(view, unsigned).max()) < negative


def blocks(count: int, step: int = BLOCK) -> Iterator[slice]:
    """Slices that cover `count` elements, of at most so many each."""
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def as_array(view: memoryview, dtype: str) -> Array:
    """The bytes as a flat array of their own dtype, without a copy."""
    return np.frombuffer(view, np.uint8 if dtype == "U8" else DTYPES[dtype])


def to_float32(array: Array) -> Singles:
    """Values in float32 (exact from all three formats)."""
    return array.astype(np.float32)


def rounded(array: Array, dtype: str) -> Singles:
    """Values as a dtype has them, in float32."""
    return to_float32(as_array(to_bytes(array, dtype), dtype)).reshape(array.shape)


def moved(origin: npt.NDArray[np.floating], shift: Doubles) -> Doubles:
    """The sum of both, where a shift of zero keeps even the sign of a zero."""
    return np.asarray(np.where(shift == 0, origin, origin + shift))


def to_bytes(array: Array, dtype: str) -> memoryview:
    """Values rounded (to nearest, ties to even) to the named dtype, as bytes."""
    with np.errstate(over="ignore"):
        converted = np.ascontiguousarray(array.astype(DTYPES[dtype], copy=False))
    view: memoryview = converted.view(np.uint8).data
    return view.cast("B")
