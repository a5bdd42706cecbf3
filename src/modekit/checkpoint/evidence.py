"""A router's table of evidence inside an embedding, as planning/channels.py says.

Shape legend: V vocabulary, D the base's hidden size, P channels besides it, N columns of evidence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from modekit.checkpoint.evidence_file import rows_of
from modekit.checkpoint.router_file import FIT_ANEW
from modekit.errors import CheckpointError, RecipeError
from modekit.planning.channels import Channels
from modekit.sources.contents import OpenFiles
from modekit.sources.header import TensorRef
from modekit.weights.numeric import DTYPES, Doubles, Singles, as_array, is_finite, to_bytes, to_float32


def evidence_columns(channels: Channels, embedding: TensorRef, table_VN: Singles) -> memoryview:
    """The columns (V, N) that say a table, in the embedding's dtype. Raises RecipeError when they are not finite in it."""
    parts = []
    unit = _unit(channels, (sizes_V for _, _, sizes_V in _sized_rows(channels, embedding)))
    for start, _, sizes_V in _sized_rows(channels, embedding):
        values = unit * channels.eps * sizes_V[:, None] * table_VN[start : start + len(sizes_V)]
        parts.append(bytes(to_bytes(values.astype(np.float32).ravel(), embedding.dtype)))
    columns = memoryview(b"".join(parts))
    if not is_finite(columns, embedding.dtype):
        raise RecipeError(
            f"the router's evidence is not finite in {DTYPES[embedding.dtype]}",
            where="mixture.router",
            remedy="raise temperature, or fit on other text",
        )
    return columns


def read_table(channels: Channels, embedding: TensorRef) -> Singles:
    """The table (V, N) that an embedding says, but for rounding. Raises CheckpointError where it is not finite."""
    parts = []
    sizes = list[Doubles]()
    for _, values, sizes_V in _sized_rows(channels, embedding):
        sizes.append(sizes_V)
        with np.errstate(all="ignore"):
            parts.append((values[:, channels.evidence] / (channels.eps * sizes_V[:, None])).astype(np.float32))
    table_VN: Singles = np.concatenate(parts) / np.float32(_unit(channels, sizes))
    if not np.isfinite(table_VN).all():
        raise CheckpointError("the router's table in the embedding is not finite", where=str(embedding.file), remedy=FIT_ANEW)
    return table_VN


def _unit(channels: Channels, sizes: Iterable[Doubles]) -> float:
    """What evidence is multiplied with: where penalties follow from it (planning/penalties.py), the usual size of an embedding,
    by which the norm behind attention divides it. Only there the sizes are asked for.
    """
    return float(np.median(np.concatenate([*sizes]))) * channels.embedding_scale if channels.inner else 1.0


def _sized_rows(channels: Channels, embedding: TensorRef) -> Iterator[tuple[int, Singles, Doubles]]:
    """Blocks of rows: the place of the first, the rows in float32, and their sizes."""
    with OpenFiles() as opened:
        for start, rows in rows_of(opened, embedding):
            values = to_float32(as_array(rows, embedding.dtype)).reshape(-1, embedding.shape[1])
            yield start, values, channels.row_scale.sizes(values[:, : channels.hidden])
