"""How a weight difference is factored, and what that takes, by its shape alone: without numpy, so that a plan can ask."""

from __future__ import annotations

import math

SMALL = 512
"""Up to this many rows or columns an exact decomposition takes less than a second."""


def is_exact(smaller: int, width: int) -> bool:
    """Whether a difference with so many rows or columns, whichever are fewer, is decomposed whole for factors of a width."""
    return smaller <= SMALL or width >= smaller // 4


def working_bytes(shape: tuple[int, ...], rank: int) -> int:
    """What `factorise` holds at its peak for a difference of a shape: copies of it in float32 and float64, as measured."""
    return (52 if is_exact(min(shape), rank) else 16) * math.prod(shape)


def bytes_of_codes(outputs: int, inputs: int, bits: int) -> int:
    """Of the codes of a weight (O, I): planes of one bit, whose rows begin at a byte."""
    return outputs * bits * -(-inputs // 8)
