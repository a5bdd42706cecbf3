"""How far a model lies from another, by a look at few numbers."""

from __future__ import annotations

from contextlib import suppress

import numpy as np

from modekit.errors import SourceError
from modekit.sources.contents import OpenFiles
from modekit.sources.source import ModelSource
from modekit.weights.stored import Stored

_TENSORS, _NUMBERS = 8, 2**14


def drift(model: ModelSource, base: ModelSource) -> float | None:
    """|model - base| / |base| of the first 16,384 numbers of up to eight matrices that both have: 1.4 of strangers.

    None where there are none, or a file cannot be read, which a build will say more of.
    """
    both = [(ref, base.tensors[name]) for name, ref in model.tensors.items() if len(ref.shape) == 2 and name in base.tensors]
    moved = size = 0.0
    with OpenFiles() as opened, suppress(SourceError):
        for pair in both[:: -(-len(both) // _TENSORS) or 1]:
            count = min(ref.numel for ref in pair)
            x, y = (Stored(opened, ref)[: min(count, _NUMBERS)].astype(np.float64) for ref in pair)
            moved, size = moved + float(np.square(x - y).sum()), size + float(np.square(y).sum())
        return float(np.sqrt(moved / size)) if size and np.isfinite(moved) else None
    return None
