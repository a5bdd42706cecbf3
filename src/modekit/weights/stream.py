"""What a text shows of the stream inside a model: how large it is before every norm, and a sample of what is read there.

Shape legend: N tokens, T sampled tokens, D hidden size, A width of what attention's output projection reads, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Singles = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LayerStream:
    """Of one layer of the base.

    Attributes:
        before_attention, before_ffn: sizes of the stream before the two norms, sqrt(mean(x^2) + eps), (N,).
        read: what attention reads, divided by its size, without the norm's weight, (T, D).
        attended: what attention's output projection reads, (T, A).
    """

    before_attention: Singles
    before_ffn: Singles
    read: Singles
    attended: Singles


@dataclass(frozen=True)
class Stream:
    """Of a model.

    Attributes:
        layers: of every layer.
        last: what the head reads, divided by its size, without the norm's weight, (T, D).
        counts: how often each token of the vocabulary is there, (V,).
    """

    layers: tuple[LayerStream, ...]
    last: Singles
    counts: npt.NDArray[np.int64]
