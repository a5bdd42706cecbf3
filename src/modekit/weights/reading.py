"""What the numbers of a result are computed from: open files, by one thread."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from modekit.errors import SourceError
from modekit.files.write import write_all
from modekit.sources.contents import OpenFiles
from modekit.sources.header import TensorRef
from modekit.sources.source import ModelSource
from modekit.weights.factorise import Factors, factorise
from modekit.weights.flat import stored
from modekit.weights.numeric import Singles, blocks, is_finite, to_float32

if TYPE_CHECKING:
    from modekit.weights.padding import Fills


class WeightReader:
    """The open files that numbers are computed from, by one thread.

    Attributes:
        models: whose files they are, for messages.
        fills: the new parts of tensors that carry more than FFNs, where there are any.
    """

    def __init__(self, opened: OpenFiles, models: Sequence[ModelSource]) -> None:
        self.opened = opened
        self.models = models
        self.fills: Fills | None = None
        # Of one weight of the base and every expert: what is computed for A serves for B, which comes next.
        self._factored: tuple[TensorRef | None, dict[tuple[TensorRef, int], Factors]] = (None, {})

    def copy(self, ref: TensorRef, stream: io.FileIO) -> None:
        """Write a stored tensor's bytes, inside the kernel where the system can: from page cache to page cache."""
        source = self.opened.file(ref)
        position = ref.start
        while position < ref.end:
            try:
                sent = os.sendfile(stream.fileno(), source.stream.fileno(), position, ref.end - position)
            except (AttributeError, OSError):  # copying through the process works, or tells whose error it is
                for chunk in source.chunks(position, ref.end):
                    write_all(stream, chunk)
                return
            if sent == 0:
                raise source.ended()
            position += sent

    def check_all_finite(self, refs: Sequence[TensorRef]) -> None:
        """Raise SourceError when one of these tensors holds NaN or Inf."""
        for ref in dict.fromkeys(refs):
            for chunk in self.opened.chunks(ref):
                check_finite(self.models, ref, chunk)

    def factors(self, expert: TensorRef, base: TensorRef, rank: int) -> Factors:
        """The best ones of a difference. Raises SourceError where it overflows."""
        if self._factored[0] != base:
            self._factored = (base, {})
        known = self._factored[1]
        key = (expert, rank)
        if key not in known:
            try:
                known[key] = factorise(self.difference(expert, base), rank=rank)
            except ValueError:
                raise SourceError(
                    "the expert's difference to the base model overflows float32",
                    where=where_of(self.models, [base, expert]),
                    remedy="the model is damaged: save or download it again",
                ) from None
        return known[key]

    def difference(self, expert: TensorRef, base: TensorRef) -> Singles:
        """Expert - base, in their shape."""
        moved = stored(self.opened, expert)
        still = stored(self.opened, base)
        delta = np.empty(len(still), np.float32)
        with np.errstate(over="ignore"):
            for part in blocks(len(still)):
                np.subtract(to_float32(moved[part]), to_float32(still[part]), out=delta[part])
        return delta.reshape(base.shape)


def where_of(models: Sequence[ModelSource], refs: Sequence[TensorRef]) -> str:
    """The model that the last tensor is of, and the name of the first, for messages."""
    source = next((each for each in models if refs[-1].file in each.files), None)
    return f"{source.where if source is not None else refs[-1].file}: {refs[0].name}"


def check_finite(models: Sequence[ModelSource], ref: TensorRef, view: memoryview) -> None:
    """Raise SourceError that names model and tensor when a block of its bytes holds NaN or Inf."""
    if not is_finite(view, ref.dtype):
        raise SourceError(
            "the weights hold NaN or Inf",
            where=where_of(models, [ref]),
            remedy="the model is damaged: save or download it again",
        )
