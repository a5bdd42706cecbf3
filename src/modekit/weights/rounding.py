"""What few bits per number took from a model, as far as another model beside it shows."""

from __future__ import annotations

from contextlib import suppress

import numpy as np

from modekit.errors import SourceError
from modekit.sources.contents import OpenFiles
from modekit.sources.model import ModelSource, TensorRef
from modekit.sources.quantised import PackedRef
from modekit.weights.stored import Stored

_TENSORS, _NUMBERS = 8, 2**16


def nearest_difference(first: ModelSource, second: ModelSource) -> float | None:
    """The smallest relative difference |x - y| / |y| among up to eight tensors that one of two models holds in few bits, x, and
    the other whole, y, by the first 65,536 numbers of each. None where there are no such tensors.

    Rounding takes at most that much from this tensor, since what fine-tuning changed is in it, too. None as well where a file
    cannot be read: one that is still on the hub, or that a build will say more of.
    """
    both = ((ref, second.tensors[name]) for name, ref in first.tensors.items() if _comparable(ref, second, name))
    pairs = [(one, other) if _is_packed(one) else (other, one) for one, other in both]
    with OpenFiles() as opened, suppress(SourceError):
        return min((_difference(opened, *pair) for pair in pairs[:: -(-len(pairs) // _TENSORS) or 1]), default=None)
    return None


def _comparable(ref: TensorRef, other: ModelSource, name: str) -> bool:
    found = other.tensors.get(name)
    return found is not None and found.shape == ref.shape and _is_packed(found) != _is_packed(ref)


def _is_packed(ref: TensorRef) -> bool:
    """Whether a tensor takes less than two bytes per number: norms of a GGUF file are whole."""
    return isinstance(ref, PackedRef) and sum(part.nbytes for part in ref.parts) < 2 * ref.numel


def _difference(opened: OpenFiles, packed: TensorRef, whole: TensorRef) -> float:
    count = min(whole.numel, _NUMBERS)
    x, y = (Stored(opened, ref)[:count].astype(np.float64) for ref in (packed, whole))
    return float(np.linalg.norm(x - y) / max(float(np.linalg.norm(y)), 1e-30))
