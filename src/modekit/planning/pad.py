"""How a tensor of the base stands in a larger one of the result."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

Entry = tuple[int, int, float]
"""Row, column and value of one number in the new part of a widened tensor."""


@dataclass(frozen=True)
class Measured:
    """A column that every row e of an embedding gets by its own size: value sqrt(mean(e^2) scale^2 + norm_eps) / scale, or,
    where no norm follows (None), value.
    """

    column: int
    value: float
    scale: float
    norm_eps: float | None


@dataclass(frozen=True)
class Pad:
    """A tensor of the base in a larger one: its own numbers first, zeros or `entries` behind them.

    Attributes:
        rows, columns: how many more there are. A tensor with one axis has columns only, one with three is widened matrix by
            matrix.
        scale: what the base's numbers are multiplied with.
        entries: in the new part of the first matrix.
        measured: a column that follows from the row, if there is one.
        free: columns that the fit of a router sets later.
    """

    rows: int = 0
    columns: int = 0
    scale: float = 1.0
    entries: tuple[Entry, ...] = ()
    measured: Measured | None = None
    free: slice | None = None

    def widened(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the result for a tensor of this shape."""
        if len(shape) == 1:
            return (shape[0] + self.columns,)
        return (*shape[:-2], shape[-2] + self.rows, shape[-1] + self.columns)

    def identity(self) -> list[Any]:
        """What distinguishes it from other pads, for a plan's digest."""
        entries = hashlib.sha256(json.dumps(self.entries).encode()).hexdigest()
        measured = self.measured and [self.measured.column, self.measured.value, self.measured.scale, self.measured.norm_eps]
        return [self.rows, self.columns, self.scale, entries, measured]
