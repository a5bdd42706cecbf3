"""A mixture in a native architecture, modekit's or a stranger's: its experts as matrices of channels; a smaller one, written.

Shape legend: L layers, E experts, F hidden channels of an expert, C numbers of a channel (near.py), D hidden size.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from modekit.checkpoint.checkpoint import open_checkpoint
from modekit.checkpoint.record import RECORD_FILE
from modekit.conversion.near import Array32, Array64, Group, mean_expert
from modekit.errors import UnsupportedError
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
        row_of_type = next((row for row in NATIVES if row.native_type == config["model_type"]), None)
        if row_of_type is None or "quantization_config" in config:
            raise UnsupportedError(
                "only plain mixtures of whole FFNs have experts that can be merged",
                where=str(folder),
                found=f"{config['model_type']}{'' if row_of_type is None else ', quantised'}",
                expected=", ".join(dict.fromkeys(row.native_type for row in NATIVES)),
                remedy="build with output: {format: native}, or take experts out with modekit remove",
            )
        tensors: dict[str, TensorRef] = {}
        for file in weight_files(folder, where=str(folder)):
            tensors |= read_header(file, where=str(folder))
        names = open_checkpoint(folder).names if (folder / RECORD_FILE).exists() else []
        mixture = cls(config, row_of_type, tensors, names)
        lacking = next((name for layer in range(mixture.layers) for name in mixture.parts(layer) if name not in tensors), None)
        if lacking is not None:
            raise UnsupportedError(
                "a tensor of an expert is missing",
                where=f"{folder}: {lacking}",
                expected="experts in every layer",
                remedy="save the mixture again, if it is not meant to have layers without experts",
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

    def rows(self, layer: int) -> dict[str, int]:
        """Tensors of the router, the gate first, and their axis of experts."""
        biases = {each.name: each.shape.index("E") for each in self.native.constants if "E" in each.shape}
        return {in_layer(layer, name): axis for name, axis in {self.native.router: 0, **biases}.items()}

    def parts(self, layer: int) -> list[str]:
        """Names of the tensors of a layer that have a part for every expert."""
        apart = [path.format(expert=e) for e in range(self.experts) for path in (self.native.experts or {}).values()]
        return [*self.rows(layer), *(in_layer(layer, name) for name in (*(self.native.fused or ()), *apart))]

    def expert(self, opened: OpenFiles, layer: int, expert: int) -> Array32:
        """Gate and up, and down turned round, side by side, (F, C)."""
        if self.native.experts is not None:
            paths = {part: in_layer(layer, path.format(expert=expert)) for part, path in self.native.experts.items()}
            parts = {part: _read(opened, self.tensors[name]) for part, name in paths.items()}
            return np.concatenate([parts["gate"], parts["up"], parts["down"].T], axis=1)
        assert self.native.fused is not None
        both, down = (_read(opened, self.tensors[in_layer(layer, name)], expert, self.experts) for name in self.native.fused)
        return np.concatenate([*np.split(both, 2), down.T], axis=1)


def _read(opened: OpenFiles, ref: TensorRef, place: int = 0, of: int = 1) -> Array32:
    """A matrix, or one of several in a tensor."""
    size = ref.numel // of
    return to_float32(Stored(opened, ref)[place * size : (place + 1) * size]).reshape(ref.shape[-2:])


def merged_layer(
    plain: PlainMixture, opened: OpenFiles, layer: int, groups: Sequence[Group], counts_E: Array64
) -> dict[str, Array32]:
    """The experts of one layer in groups, and what its router has of them, by name; each counts as often as it was chosen."""
    native, hidden = plain.native, whole(plain.config, "hidden_size")
    shares = [counts_E[group] / counts_E[group].sum() for group in groups]
    made, experts = dict[str, Array32](), []
    for name, axis in plain.rows(layer).items():
        apart = np.moveaxis(_read(opened, plain.tensors[name]), axis, 0)
        rows = np.stack([np.average(apart[group], 0, share) for share, group in zip(shares, groups, strict=True)])
        made[name] = np.moveaxis(rows, 0, axis).astype(np.float32)
    for share, group in zip(shares, groups, strict=True):
        mean_FC = mean_expert([plain.expert(opened, layer, expert) for expert in group], share)
        gate, up, down = np.split(mean_FC, [hidden, 2 * hidden], axis=1)
        experts.append({"gate": gate, "up": up, "down": down.T})
    for part, path in (native.experts or {}).items():
        made |= {in_layer(layer, path.format(expert=number)): expert[part] for number, expert in enumerate(experts)}
    if native.fused is not None:
        of_both, of_down = (in_layer(layer, name) for name in native.fused)
        made[of_both] = np.stack([np.concatenate([expert["gate"], expert["up"]]) for expert in experts])
        made[of_down] = np.stack([expert["down"] for expert in experts])
    return made


def write_smaller(
    plain: PlainMixture, opened: OpenFiles, groups: Sequence[Sequence[Group]], chosen_LE: Array64, stage: Staging, run: Run
) -> None:
    """Shards, one per layer of experts and one for the rest, index and config; one layer is in memory at a time."""
    own = {name for layer in range(plain.layers) for name in plain.parts(layer)}
    rest = {name: ref.shape for name, ref in plain.tensors.items() if name not in own}
    weight_map, total, files = dict[str, str](), 0, plain.layers + 1
    for number in run.over("write", range(files), files):
        at = number - 1
        made = merged_layer(plain, opened, at, groups[at], chosen_LE[at]) if number else {}
        shapes = {name: values.shape for name, values in made.items()} or rest
        refs = [plain.tensors[name] for name in shapes]

        def write_next(place: int, stream: io.FileIO, refs: list[TensorRef] = refs, made: Mapping[str, Array32] = made) -> None:
            ref = refs[place]
            for block in [to_bytes(made[ref.name].ravel(), ref.dtype)] if made else opened.chunks(ref):
                write_all(stream, block)

        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        entries = [(ref.name, ref.dtype, shapes[ref.name], math.prod(shapes[ref.name]) * ITEMSIZE[ref.dtype]) for ref in refs]
        stage.write_shard(file, entries, write_next)
        weight_map |= {ref.name: file for ref in refs}
        total += sum(nbytes for *_, nbytes in entries)
    write_json(stage.folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    to, top_k = len(groups[0]), plain.native.top_k_key
    fewer = {plain.count_key: to, top_k: min(to, whole(plain.config, top_k))}
    write_json(stage.folder / "config.json", {**plain.config, **fewer})
