"""What all ways to make a tensor have (made.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from modekit.sources.header import TensorRef
from modekit.sources.rows import stored_refs

if TYPE_CHECKING:
    from modekit.weights.made import Made

PLAIN = 8  # arrays of a plain block: read, in float32, scaled, rounded; small, so that they stay in the processor's cache


class Making:
    """What all ways have: of their parts, unless they say so themselves."""

    hides: ClassVar[bool] = False  # whether computing may hide a NaN that is read

    @property
    def parts(self) -> tuple[Made, ...]:
        return ()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[0].shape

    @property
    def read(self) -> tuple[TensorRef, ...]:
        """Tensors that it reads itself."""
        return ()

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """Tensors on disk, or rows of them, that are read."""
        own = tuple(each for ref in self.read for each in stored_refs(ref))
        return own + tuple(ref for part in self.parts for ref in part.refs)

    @property
    def computed(self) -> tuple[TensorRef, ...]:
        """Those in which a NaN must be found before."""
        return self.refs if self.hides else tuple(ref for part in self.parts for ref in part.computed)

    @property
    def arrays(self) -> int:
        """How many arrays of a block's size lie side by side in memory."""
        return max((part.arrays for part in self.parts), default=1)


@dataclass(frozen=True)
class Stored(Making):
    """A tensor on disk."""

    ref: TensorRef
    arrays = PLAIN

    @property
    def read(self) -> tuple[TensorRef, ...]:
        return (self.ref,)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.ref.shape


@dataclass(frozen=True)
class Changed(Making):
    """One made otherwise, with a change."""

    of: Made

    @property
    def parts(self) -> tuple[Made, ...]:
        return (self.of,)
