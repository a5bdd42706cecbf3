"""How a native checkpoint carries more than FFNs: the bases and scales that its tensors were computed with.

They come from a text's stream, and are kept so that `verify` computes every tensor again. With them and the sources all follows
(building/carrying.py).

Shape legend: D hidden size, K units per channel, N outputs of q, k and v together, A inputs of o, V vocabulary, R_U and R_V
channels.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.errors import SourceError
from modekit.files.read import open_regular
from modekit.files.write import safetensors_header, write_all
from modekit.planning.choice import ANYWAY, MOST_LOST
from modekit.sources.contents import CHUNK, OpenFiles, read_header
from modekit.sources.header import ITEMSIZE
from modekit.weights.bases import PassThrough
from modekit.weights.flat import read_float32
from modekit.weights.nearest import OwnReads
from modekit.weights.numeric import DTYPES, Singles, to_bytes

CARRIED_FILE, LOST = "carried.safetensors", "lost"
_LEAST_SAID = 0.001
_LEAST_NATS = 0.001
"""Per token: whoever loses less of an expert that hardly differs from its base misses nothing."""
_ERRORS = 2.0
"""Standard errors by which a loss must be beyond a bound."""
_OF_LAYERS, _ALONE = ("inputs", "input_shares", "outputs"), ("head", "embedding", "shares")
_READ, _READ_ALONE = ("read", "attended"), "last"


class Lost(NamedTuple):
    """What a plain checkpoint loses of one expert, measured on its text at the build.

    Attributes:
        share: KL(own || written) / KL(own || base), where a token counts one nat at most.
        error: the standard error of `share`, over pieces of documents.
        nats: KL(own || written), per token.
    """

    share: float
    error: float
    nats: float

    @property
    def is_too_much(self) -> bool:
        """Whether more than MOST_LOST is lost, beyond the error."""
        return self.nats > _LEAST_NATS and self.share - _ERRORS * self.error > MOST_LOST

    @property
    def is_clear(self) -> bool:
        """Whether more text would hardly change that."""
        return self.nats <= _LEAST_NATS or abs(self.share - MOST_LOST) > 2 * _ERRORS * self.error


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
        reads: what each expert reads of its own text, where all share their average (weights/nearest.py), or nothing.
        lost: of each expert (building/lost.py); none where there is a channel for all that experts differ by.
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
    reads: OwnReads | None = None
    lost: tuple[Lost, ...] = ()

    def write(self, stream: io.FileIO) -> None:
        """As a file of safetensors."""
        arrays = {
            "units": np.array([[each.size, each.error, *each.alphas, *each.betas] for each in self.units], np.float32),
            "output_sizes": np.array(self.output_sizes, np.float32),
            "input_sizes": np.array(self.input_sizes, np.float32),
            "still": np.array([self.still], np.float32),
            **{f"{name}.{layer}": each for name in _OF_LAYERS for layer, each in enumerate(getattr(self, name))},
            **{name: getattr(self, name) for name in _ALONE if getattr(self, name) is not None},
            **({LOST: np.array(self.lost, np.float32)} if self.lost else {}),
        }
        if self.reads is not None:
            arrays |= {f"{name}.{layer}": each for name in _READ for layer, each in enumerate(getattr(self.reads, name))}
            arrays[_READ_ALONE] = self.reads.last
        codes = {name: "BF16" if name.split(".")[0] in (*_READ, _READ_ALONE) else "F32" for name in arrays}
        entries = [(name, codes[name], each.shape, each.size * ITEMSIZE[codes[name]]) for name, each in arrays.items()]
        write_all(stream, memoryview(safetensors_header(entries)))
        for name, each in arrays.items():
            write_all(stream, to_bytes(each, codes[name]))


def read_carried(folder: Path) -> Carried:
    """Of a checkpoint, whose record has the file's digest. Raises SourceError where it cannot be read."""
    arrays = _arrays(folder)
    return Carried(
        units=tuple(_units(*map(float, row)) for row in arrays["units"]),
        output_sizes=tuple(map(float, arrays["output_sizes"])),
        input_sizes=tuple(map(float, arrays["input_sizes"])),
        still=float(arrays["still"][0]),
        inputs=_numbered(arrays, "inputs"),
        input_shares=_numbered(arrays, "input_shares"),
        outputs=_numbered(arrays, "outputs"),
        **{name: arrays.get(name) for name in _ALONE},
        reads=_reads(arrays) if _READ_ALONE in arrays else None,
        lost=_lost(arrays, folder),
    )


def stream_sizes(folder: Path) -> list[float]:
    """The median size of the stream before the FFN's norm, in each layer of a checkpoint. Raises SourceError."""
    sizes: list[float] = _arrays(folder, "units")["units"][:, 0].tolist()
    return sizes


def lost_of(folder: Path) -> tuple[Lost, ...]:
    """What a checkpoint loses of each expert, measured when it was built; nothing where it loses none. Raises SourceError."""
    return _lost(_arrays(folder, LOST), folder) if (folder / CARRIED_FILE).exists() else ()


def _arrays(folder: Path, *names: str) -> dict[str, Singles]:
    """Those with these names that are there, or all."""
    with OpenFiles() as opened:
        refs = read_header(folder / CARRIED_FILE, where=str(folder))
        asked = {name: ref for name, ref in refs.items() if not names or name in names}
        damaged = next((name for name, ref in asked.items() if ref.dtype not in DTYPES), None)
        if damaged is not None:
            raise _not_ours(folder, damaged, asked[damaged].dtype)
        return {name: read_float32(opened, ref) for name, ref in asked.items()}


def _lost(arrays: Mapping[str, Singles], folder: Path) -> tuple[Lost, ...]:
    found = arrays.get(LOST, np.zeros((0, len(Lost._fields)), np.float32))
    if found.shape[1:] != (len(Lost._fields),) or not (np.isfinite(found).all() and (found >= 0).all()):
        raise _not_ours(folder, LOST, "other numbers than a build writes")
    return tuple(Lost(*map(float, row)) for row in found)


def _not_ours(folder: Path, name: str, found: str) -> SourceError:
    return SourceError(
        "a file of the mixture was changed",
        where=f"{folder / CARRIED_FILE}: {name}",
        found=found,
        remedy="build the mixture again",
    )


def lost_notes(names: Sequence[str], lost: Sequence[Lost], *, would: bool = False) -> Iterator[str]:
    """What a plain checkpoint loses of its experts, or would lose, in a sentence."""
    most = sorted(zip(lost, names, strict=False), reverse=True)
    shown = [(each, name) for each, name in most if each.share >= _LEAST_SAID and each.nats > _LEAST_NATS / 10]
    shares = ", ".join(f"{each.share:.1%} ± {each.error:.1%} of {name}" for each, name in shown)
    if would:
        yield f"not a plain checkpoint, which would lose {shares}, of what they change of the base; {ANYWAY}"
    elif lost:
        yield f"this plain checkpoint loses {shares or 'less than 0.1% of any expert'}, of what they change of the base"


def lost_by(checkpoint: Checkpoint) -> list[str]:
    """What one loses of its experts, in a sentence, as measured at the build; nothing of one that was trained since."""
    return [] if checkpoint.record.trained else [*lost_notes(checkpoint.names, lost_of(checkpoint.folder))]


def carried_digest(folder: Path) -> str:
    """sha256 of the file in a checkpoint's folder; empty where there is none."""
    path, digest = folder / CARRIED_FILE, hashlib.sha256()
    if not path.exists():
        return ""
    with open_regular(path) as stream:
        while block := stream.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def _units(size: float, error: float, *both: float) -> PassThrough:
    terms = len(both) // 2
    return PassThrough(size, both[:terms], both[terms:], error)


def _reads(arrays: Mapping[str, Singles]) -> OwnReads:
    read, attended = (_numbered(arrays, name) for name in _READ)
    return OwnReads(read, attended, arrays[_READ_ALONE])


def _numbered(arrays: Mapping[str, Singles], name: str) -> tuple[Singles, ...]:
    count = sum(each.startswith(f"{name}.") for each in arrays)
    return tuple(arrays[f"{name}.{number}"] for number in range(count))
