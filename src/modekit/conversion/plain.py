"""A mixture in a native architecture, modekit's or a stranger's: its experts as matrices of channels; a smaller one, written.

Shape legend: L layers, E experts, F hidden channels of an expert, C numbers of a channel (near.py), D hidden size.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from modekit.checkpoint.checkpoint import open_checkpoint
from modekit.checkpoint.record import RECORD_FILE
from modekit.conversion.near import Array32, Array64, Group, mean_expert
from modekit.errors import CheckpointError, UnsupportedError
from modekit.files.staging import Staging
from modekit.files.tensors import write_all
from modekit.files.write import write_json
from modekit.planning.plan import INDEX_FILE
from modekit.run import Run
from modekit.sources.contents import OpenFiles
from modekit.sources.family import Config, whole
from modekit.sources.header import ITEMSIZE
from modekit.sources.model import TensorRef, read_header, weight_files
from modekit.sources.model_config import read_config
from modekit.sources.names import in_layer
from modekit.sources.native import NATIVES
from modekit.sources.native_row import Native
from modekit.weights.numeric import to_bytes, to_float32
from modekit.weights.stored import Stored


@dataclass(frozen=True)
class PlainMixture:
    """A mixture in a native architecture by its headers; `names`: of modekit's experts."""

    config: Config
    native: Native
    tensors: Mapping[str, TensorRef]
    names: list[str]

    @classmethod
    def opened(cls, folder: Path) -> PlainMixture:
        """Raises UnsupportedError for another architecture, SourceError."""
        config = read_config(folder, where=str(folder))
        native = next((row for row in NATIVES if row.native_type == config["model_type"]), None)
        if native is None:
            raise UnsupportedError(
                "only plain mixtures of whole FFNs have experts that can be merged",
                where=str(folder),
                found=str(config["model_type"]),
                expected=", ".join(dict.fromkeys(row.native_type for row in NATIVES)),
                remedy="build with output: {format: native}, or take experts out with modekit remove",
            )
        tensors: dict[str, TensorRef] = {}
        for file in weight_files(folder, where=str(folder)):
            tensors |= read_header(file, where=str(folder))
        mixture = cls(config, native, tensors, _names_in(folder))
        lacking = next((name for layer in range(mixture.layers) for name in mixture.parts(layer) if name not in tensors), None)
        if lacking is not None:
            raise CheckpointError(
                "a tensor of an expert is missing", where=f"{folder}: {lacking}", remedy="save the mixture again"
            )
        return mixture

    @property
    def experts(self) -> int:
        """E."""
        return whole(self.config, self.count_key)

    @property
    def count_key(self) -> str:
        """By which config.json says E: transformers has two names for it."""
        key = self.native.num_experts_key
        return key if key in self.config else "num_local_experts"

    @property
    def layers(self) -> int:
        """L."""
        return whole(self.config, "num_hidden_layers")

    @property
    def identity(self) -> list[object]:
        """Of its files as they are."""
        return [[str(ref.file), name, ref.start, str(ref.state)] for name, ref in self.tensors.items()]

    def parts(self, layer: int) -> list[str]:
        """Names of the tensors of a layer that have a part for every expert, the gate first."""
        fused = list(self.native.fused or ())
        apart = [path.format(expert=e) for e in range(self.experts) for path in (self.native.experts or {}).values()]
        return [in_layer(layer, name) for name in (self.native.router, *fused, *apart)]

    def expert(self, opened: OpenFiles, layer: int, expert: int) -> Array32:
        """Gate and up, and down turned round, side by side, (F, C)."""
        if self.native.experts is not None:
            paths = {part: in_layer(layer, path.format(expert=expert)) for part, path in self.native.experts.items()}
            parts = {part: _read(opened, self.tensors[name]) for part, name in paths.items()}
            return np.concatenate([parts["gate"], parts["up"], parts["down"].T], axis=1)
        assert self.native.fused is not None
        both, down = (_read(opened, self.tensors[in_layer(layer, name)], expert, self.experts) for name in self.native.fused)
        return np.concatenate([*np.split(both, 2), down.T], axis=1)


def _names_in(folder: Path) -> list[str]:
    """Of modekit's experts; none of a stranger's."""
    return open_checkpoint(folder).names if (folder / RECORD_FILE).exists() else []


def _read(opened: OpenFiles, ref: TensorRef, place: int = 0, of: int = 1) -> Array32:
    """A matrix, or one of several in a tensor."""
    size = ref.numel // of
    return to_float32(Stored(opened, ref)[place * size : (place + 1) * size]).reshape(ref.shape[-2:])


@dataclass(frozen=True)
class NewTensor:
    """A tensor of the smaller mixture, made when it is written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    content: Callable[[], Iterable[memoryview]]

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class MergedLayer:
    """The experts of one layer in groups; `counts_E` is how much each expert counts in its group's mean."""

    plain: PlainMixture
    opened: OpenFiles
    layer: int
    groups: Sequence[Group]
    counts_E: Array64

    def tensors(self) -> Iterator[NewTensor]:
        """Gate, and the experts apart or all in one."""
        native, hidden = self.plain.native, whole(self.plain.config, "hidden_size")
        gate = self.plain.tensors[in_layer(self.layer, native.router)]
        yield self._tensor(in_layer(self.layer, native.router), gate, (len(self.groups), gate.shape[1]), self._gate)
        for part, path in (native.experts or {}).items():
            for number in range(len(self.groups)):
                name = in_layer(self.layer, path.format(expert=number))
                ref = self.plain.tensors[name]
                yield self._tensor(name, ref, ref.shape, lambda number=number, part=part: self._part(number, part, hidden))
        for part, path in zip(("both", "down"), native.fused or (), strict=False):
            name = in_layer(self.layer, path)
            ref, count = self.plain.tensors[name], range(len(self.groups))
            shape = (len(self.groups), *ref.shape[1:])
            yield self._tensor(name, ref, shape, lambda part=part, count=count: self._stacked(count, part, hidden))

    def _tensor(self, name: str, ref: TensorRef, shape: tuple[int, ...], make: Callable[[], Array32]) -> NewTensor:
        return NewTensor(name, ref.dtype, shape, lambda: [to_bytes(np.ascontiguousarray(make()).ravel(), ref.dtype)])

    @cached_property
    def _experts(self) -> list[Array32]:
        return [
            mean_expert([self.plain.expert(self.opened, self.layer, expert) for expert in group], self._shares(group))
            for group in self.groups
        ]

    def _shares(self, group: Group) -> Array64:
        counts = self.counts_E[group]
        return np.asarray(counts / counts.sum())

    def _gate(self) -> Array32:
        rows_ED = _read(self.opened, self.plain.tensors[in_layer(self.layer, self.plain.native.router)])
        return np.stack([self._shares(group) @ rows_ED[group] for group in self.groups]).astype(np.float32)

    def _part(self, number: int, part: str, hidden: int) -> Array32:
        gate, up, down = np.split(self._experts[number], [hidden, 2 * hidden], axis=1)
        return {"gate": gate, "up": up, "down": down.T, "both": np.concatenate([gate, up])}[part]

    def _stacked(self, numbers: Iterable[int], part: str, hidden: int) -> Array32:
        return np.stack([self._part(number, part, hidden) for number in numbers])


def write_smaller(
    plain: PlainMixture, opened: OpenFiles, groups: Sequence[Sequence[Group]], chosen_LE: Array64, stage: Staging, run: Run
) -> None:
    """Shards, one per layer of experts and one for the rest, index and config; one layer is in memory at a time."""
    own = {name for layer in range(plain.layers) for name in plain.parts(layer)}
    rest = [NewTensor(n, r.dtype, r.shape, lambda r=r: opened.chunks(r)) for n, r in plain.tensors.items() if n not in own]
    weight_map, total = dict[str, str](), 0
    for number in run.over("write", range(plain.layers + 1), plain.layers + 1):
        layer = number - 1
        tensors = list(MergedLayer(plain, opened, layer, groups[layer], chosen_LE[layer]).tensors()) if number else rest
        file = f"model-{number + 1:05d}-of-{plain.layers + 1:05d}.safetensors"

        def write_next(at: int, stream: io.FileIO, tensors: Sequence[NewTensor] = tensors) -> None:
            for block in tensors[at].content():
                write_all(stream, block)

        stage.write_shard(file, [(each.name, each.dtype, each.shape, each.nbytes) for each in tensors], write_next)
        weight_map |= {each.name: file for each in tensors}
        total += sum(each.nbytes for each in tensors)
    write_json(stage.folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    to, native = len(groups[0]), plain.native
    top_k = min(to, whole(plain.config, native.top_k_key))
    write_json(stage.folder / "config.json", {**plain.config, plain.count_key: to, native.top_k_key: top_k})
