"""How a native checkpoint carries more than FFNs: the bases and scales that its tensors were computed with.

They come from a text's stream, and are kept so that `verify` computes every tensor again. With them and the sources all follows
(building/carrying.py).

Shape legend: K units per channel, N outputs of q, k and v together, A inputs of o, V vocabulary, R_U and R_V channels.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from modekit.files.read import LARGE, read_bytes
from modekit.files.tensors import safetensors_header
from modekit.sources.contents import OpenFiles
from modekit.sources.model import read_header
from modekit.weights.numeric import as_array, to_float32
from modekit.weights.pass_through import PassThrough

CARRIED_FILE = "carried.safetensors"

Singles = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Carried:
    """Of one checkpoint.

    Attributes:
        units: of every layer of the result, the one in front first.
        output_sizes: root mean square of what U stands for, over the stream's size there, per layer of the result.
        input_sizes: the same of V, per layer of the base, and at the end that of the head.
        still: value of the channel that is the same everywhere.
        inputs: Q (N, R_V) per layer of the base, or nothing.
        input_shares: what outputs of q, k and v were divided by (3,), per layer of the base.
        outputs: G (A, R_U) per layer of the base, or nothing (weights/bases.py).
        head: Q (V, R_V), or nothing.
        embedding: Z (V, R_U), or nothing.
        shares: how often the text has each token, (V,), where there is an embedding.
    """

    units: tuple[PassThrough, ...]
    output_sizes: tuple[float, ...]
    input_sizes: tuple[float, ...]
    still: float
    inputs: tuple[Singles, ...]
    input_shares: tuple[Singles, ...]
    outputs: tuple[Singles, ...]
    head: Singles | None = None
    embedding: Singles | None = None
    shares: Singles | None = None

    def content(self) -> bytes:
        """As a file of safetensors."""
        arrays = {
            "units": np.array([[each.size, each.error, *each.alphas, *each.betas] for each in self.units], np.float32),
            "output_sizes": np.array(self.output_sizes, np.float32),
            "input_sizes": np.array(self.input_sizes, np.float32),
            "still": np.array([self.still], np.float32),
            **{f"inputs.{layer}": each for layer, each in enumerate(self.inputs)},
            **{f"input_shares.{layer}": each for layer, each in enumerate(self.input_shares)},
            **{f"outputs.{layer}": each for layer, each in enumerate(self.outputs)},
        }
        for name, array in (("head", self.head), ("embedding", self.embedding), ("shares", self.shares)):
            if array is not None:
                arrays[name] = array
        stream = io.BytesIO()
        stream.write(safetensors_header([(name, "F32", each.shape, each.nbytes) for name, each in arrays.items()]))
        for each in arrays.values():
            stream.write(np.ascontiguousarray(each, np.float32).tobytes())
        return stream.getvalue()


def read_carried(folder: Path) -> Carried:
    """Of a checkpoint. Raises SourceError where the file is damaged, KeyError where something is missing."""
    with OpenFiles() as opened:
        refs = read_header(folder / CARRIED_FILE, where=str(folder))
        arrays = {name: to_float32(as_array(opened.read(ref), ref.dtype)).reshape(ref.shape) for name, ref in refs.items()}
    return Carried(
        tuple(_units(*map(float, row)) for row in arrays["units"]),
        tuple(map(float, arrays["output_sizes"])),
        tuple(map(float, arrays["input_sizes"])),
        float(arrays["still"][0]),
        _numbered(arrays, "inputs"),
        _numbered(arrays, "input_shares"),
        _numbered(arrays, "outputs"),
        arrays.get("head"),
        arrays.get("embedding"),
        arrays.get("shares"),
    )


def carried_digest(folder: Path) -> str:
    """sha256 of the file in a checkpoint's folder; empty where there is none."""
    path = folder / CARRIED_FILE
    return hashlib.sha256(read_bytes(path, LARGE)).hexdigest() if path.exists() else ""


def _units(size: float, error: float, *both: float) -> PassThrough:
    terms = len(both) // 2
    return PassThrough(size, both[:terms], both[terms:], error)


def _numbered(arrays: Mapping[str, Singles], name: str) -> tuple[Singles, ...]:
    count = sum(each.startswith(f"{name}.") for each in arrays)
    return tuple(arrays[f"{name}.{number}"] for number in range(count))
