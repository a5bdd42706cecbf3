"""What every expert has of one tensor of the base, as a checkpoint's files hold it: for comparing experts.

Shape legend: O and I rows and columns of a tensor, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from modekit.sources.model import TensorRef


@dataclass(frozen=True)
class TensorPart:
    """Elements of a tensor from `start` on, divided by a factor that the checkpoint has folded in.

    Attributes:
        width: elements of a stored row, where it has more than a row of the mixed tensor; None: as many.
    """

    ref: TensorRef
    start: int = 0
    factor: float = 1.0
    width: int | None = None


@dataclass(frozen=True)
class LowRankPart:
    """A change scale * B A: some rows of A (R, I), the same columns of B (O, R)."""

    scale: float
    a: TensorRef
    b: TensorRef
    ranks: slice


@dataclass(frozen=True)
class MixedTensor:
    """One tensor of the base of which experts have their own.

    Attributes:
        name: of the base's tensor.
        shape: of it.
        base: where the checkpoint holds the base's; None when it does not.
        own: expert -> its whole tensor, or, with `holds_changes`, its change.
        low_rank: expert -> its low-rank change.
        holds_changes: there is no tensor of the base to take from `own`.
    """

    name: str
    shape: tuple[int, ...]
    base: TensorPart | None = None
    own: dict[int, TensorPart] = field(default_factory=dict)
    low_rank: dict[int, LowRankPart] = field(default_factory=dict)
    holds_changes: bool = False
