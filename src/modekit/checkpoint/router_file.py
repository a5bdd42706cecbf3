"""The file of a router's gates: a re-fit rewrites only that, with the index that names it (evidence_file.py has the rest)."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, Field

from modekit.errors import RecipeError
from modekit.files.typed import PlainName, read_as
from modekit.files.write import json_bytes, safetensors_header, write_file, write_json
from modekit.planning.plan import ROUTER_FILE, Plan
from modekit.planning.shape import RouterSlot
from modekit.sources.weight_files import INDEX_FILE
from modekit.weights.numeric import DTYPES, Singles, is_finite, to_bytes

FIT_ANEW = "put it back, or set the router again with `modekit fit`"
Writer = Callable[[io.FileIO], None]
Gates = Sequence[Singles]
"""The gate of every router slot, in the order of the slots, each of its slot's shape, float32."""


def write_router_file(path: Path, slots: Sequence[RouterSlot], gates: Gates, dtype: str) -> str:
    """Write the gates in a safetensors dtype; returns the file's sha256. Raises RecipeError as `router_bytes`."""
    content = router_bytes(slots, gates, dtype)
    write_file(path, content)
    return sha256_of(content)


def sha256_of(content: bytes | memoryview) -> str:
    """Of a router file, or of evidence in the embedding, as the record keeps it."""
    return hashlib.sha256(content).hexdigest()


def router_bytes(slots: Sequence[RouterSlot], gates: Gates, dtype: str) -> bytes:
    """The router file with the gates in a safetensors dtype. Raises RecipeError when they are not finite in that dtype."""
    data = [to_bytes(np.ascontiguousarray(gate).ravel(), dtype) for gate in gates]
    if not all(is_finite(view, dtype) for view in data):
        raise RecipeError(
            f"the router's gates are not finite in {DTYPES[dtype]}",
            where="mixture.router",
            remedy="raise temperature or l2, or fit on other text",
        )
    header = safetensors_header((slot.name, dtype, slot.shape, len(view)) for slot, view in zip(slots, data, strict=True))
    return header + b"".join(data)


class _Index(BaseModel):
    weight_map: dict[str, PlainName] = Field(min_length=1)


def read_index(folder: Path) -> dict[str, str]:
    """Tensor -> file of the folder, as the index says it. Raises OSError, and ValueError for what is no index."""
    return read_as(folder / INDEX_FILE, _Index).weight_map


def write_index(plan: Plan, folder: Path) -> None:
    """Write the index that tells transformers which file holds which tensor."""
    weight_map = {tensor.name: shard.file for shard in plan.shards for tensor in shard.tensors}
    write_json(folder / INDEX_FILE, _index(weight_map, plan.shape.slots, plan.bytes_written))


def changed_index(folder: Path, slots: Sequence[RouterSlot], total_size: int) -> bytes:
    """The index that is there with other gates."""
    kept = {name: file for name, file in read_index(folder).items() if file != ROUTER_FILE}
    return json_bytes(_index(kept, slots, total_size))


def _index(weight_map: Mapping[str, str], slots: Sequence[RouterSlot], total_size: int) -> dict[str, object]:
    gates = {slot.name: ROUTER_FILE for slot in slots}
    return {"metadata": {"total_size": total_size}, "weight_map": {**weight_map, **gates}}
