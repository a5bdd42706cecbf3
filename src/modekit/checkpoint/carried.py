"""How a native checkpoint carries more than FFNs: the bases and scales that its tensors were computed with.

They come from a text's stream, and are kept so that `verify` computes every tensor again. With them and the sources all follows
(building/carrying.py).

Shape legend: D hidden size, K units per channel, N outputs of q, k and v together, A inputs of o, V vocabulary, R_U and R_V
channels.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from modekit.errors import SourceError
from modekit.files.read import open_regular
from modekit.files.tensors import safetensors_header, write_all
from modekit.planning.channels import Channels
from modekit.sources.contents import CHUNK, OpenFiles
from modekit.sources.header import read_header
from modekit.weights.bases import PassThrough
from modekit.weights.numeric import read_float32

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
        ones: w (D,) per layer of the base, w x ~ 1 for what attention reads, where biases are carried.
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
    ones: tuple[Singles, ...] = ()

    def write(self, stream: io.FileIO) -> None:
        """As a file of safetensors."""
        arrays = {
            "units": np.array([[each.size, each.error, *each.alphas, *each.betas] for each in self.units], np.float32),
            "output_sizes": np.array(self.output_sizes, np.float32),
            "input_sizes": np.array(self.input_sizes, np.float32),
            "still": np.array([self.still], np.float32),
            **{f"inputs.{layer}": each for layer, each in enumerate(self.inputs)},
            **{f"input_shares.{layer}": each for layer, each in enumerate(self.input_shares)},
            **{f"outputs.{layer}": each for layer, each in enumerate(self.outputs)},
            **{f"ones.{layer}": each for layer, each in enumerate(self.ones)},
        }
        for name, array in (("head", self.head), ("embedding", self.embedding), ("shares", self.shares)):
            if array is not None:
                arrays[name] = array
        header = safetensors_header([(name, "F32", each.shape, each.nbytes) for name, each in arrays.items()])
        write_all(stream, memoryview(header))
        for each in arrays.values():
            write_all(stream, np.ascontiguousarray(each, np.float32).ravel().view(np.uint8).data)


def read_carried(folder: Path, channels: Channels, vocabulary: int) -> Carried:
    """Of a checkpoint with these channels. Raises SourceError where the file is damaged, or other arrays are in it."""
    refs = read_header(folder / CARRIED_FILE, where=str(folder))
    found = {name: (ref.dtype, ref.shape) for name, ref in refs.items()}
    expected = {name: ("F32", shape) for name, shape in _shapes(channels, vocabulary).items()}
    for name in sorted({*found, *expected}):
        if found.get(name) != expected.get(name):
            raise SourceError(
                "carried.safetensors is not that of this checkpoint",
                where=f"{folder / CARRIED_FILE}: {name}",
                found=found.get(name),
                expected=expected.get(name),
                remedy="build the mixture again",
            )
    with OpenFiles() as opened:
        arrays = {name: read_float32(opened, ref) for name, ref in refs.items()}
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
        _numbered(arrays, "ones"),
    )


def carried_digest(folder: Path) -> str:
    """sha256 of the file in a checkpoint's folder; empty where there is none."""
    path, digest = folder / CARRIED_FILE, hashlib.sha256()
    if not path.exists():
        return ""
    with open_regular(path) as stream:
        while block := stream.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def _shapes(channels: Channels, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Of every array."""
    size, layers = channels.carry, channels.layers
    assert size is not None
    read = channels.heads * channels.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "units": (layers + 1, 2 + 2 * size.terms),
        "output_sizes": (layers + 1,),
        "input_sizes": (layers + 1,),
        "still": (1,),
    }
    for layer in range(layers):
        if size.inputs:
            shapes[f"inputs.{layer}"] = (read + 2 * channels.kv_heads * channels.head_dim, size.inputs)
            shapes[f"input_shares.{layer}"] = (3,)
        if size.outputs:
            shapes[f"outputs.{layer}"] = (read, size.outputs)
        if size.biases:
            shapes[f"ones.{layer}"] = (channels.hidden,)
    if size.head:
        shapes["head"] = (vocabulary, size.inputs)
    if size.embedding:
        shapes |= {"embedding": (vocabulary, size.outputs), "shares": (vocabulary,)}
    return shapes


def _units(size: float, error: float, *both: float) -> PassThrough:
    terms = len(both) // 2
    return PassThrough(size, both[:terms], both[terms:], error)


def _numbered(arrays: Mapping[str, Singles], name: str) -> tuple[Singles, ...]:
    count = sum(each.startswith(f"{name}.") for each in arrays)
    return tuple(arrays[f"{name}.{number}"] for number in range(count))
