"""PEFT adapter folders read by header: which weights of the base an adapter changes, and by which rule.

Nothing here imports peft or torch, and nothing reads a tensor. Which module a tensor belongs to says adapter_resolve.py, what
its settings mean adapter_config.py. PEFT's merged models are the oracle of tests/sources/test_adapters.py.

Shape legend: O output, I input of a linear layer, R rank, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from modekit.errors import SourceError, UnsupportedError
from modekit.files.typed import shortened
from modekit.sources.adapter_config import (
    CONFIG_FILE,
    IA3Settings,
    LoraSettings,
    damaged,
    parse_settings,
    read_adapter_config,
)
from modekit.sources.adapter_resolve import Resolution, peft_plain
from modekit.sources.model import Elsewhere, ModelSource, TensorRef, WeightFiles
from modekit.sources.names import module_of
from modekit.sources.prefix import SoftPrefix, is_prefix, read_prefix
from modekit.sources.wrappers import naming_of

WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class LowRank:
    """LoRA on one weight of the base: W' = W + scale * B A, for W (O, I), A (R, I), B (O, R).

    Attributes:
        a: A. For an embedding, (R, V).
        b: B. For an embedding, (D, R).
        scale: alpha / R, or alpha / sqrt(R) for rsLoRA.
        rows: the rows of B, magnitude and bias that belong to this weight, when the adapter is on a fused module that the
            base keeps as separate projections; None means all.
        magnitude: DoRA's m, (O,): W' = m * (W + scale * B A) / norms of its rows. For an embedding, (D,) and columns.
        bias: (O,); the module's bias grows by scale times it.
        transposed: an embedding, W (V, D): W' = W + scale * (B A)^T.
    """

    a: TensorRef
    b: TensorRef
    scale: float
    rows: tuple[int, int] | None = None
    magnitude: TensorRef | None = None
    bias: TensorRef | None = None
    transposed: bool = False

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[0]

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """All tensors that the change is computed from."""
        return tuple(ref for ref in (self.a, self.b, self.magnitude, self.bias) if ref is not None)


@dataclass(frozen=True)
class Scaling:
    """IA3 on one weight of the base.

    Attributes:
        vector: (O, 1) or (1, I).
        axis: rows: each output is scaled, so W's rows and the bias; columns: each input (feedforward modules).
        rows: the entries of `vector` that belong to this weight, as in `LowRank.rows`; None means all.
    """

    vector: TensorRef
    axis: Literal["rows", "columns"]
    rows: tuple[int, int] | None = None

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """All tensors that the change is computed from."""
        return (self.vector,)


Change = LowRank | Scaling


@dataclass(frozen=True)
class AdapterSource(ModelSource):
    """An adapter on disk and what it does to one base model. `tensors` and `config` are the adapter's own.

    Replacing comes first: a tensor in both `replaced` and `changes` is the replacement with the change on top.

    Attributes:
        changes: name of a 2-D weight of the base -> change.
        bias_changes: name of a bias of the base -> the change that holds lora_bias or IA3's scaling of it.
        replaced: name of a tensor of the base -> the whole tensor that takes its place.
        prefix: what stands before the text; then nothing of the base changes.
        notes: what a user may want to know.
    """

    changes: Mapping[str, Change] = field(default_factory=dict, compare=False)
    bias_changes: Mapping[str, Change] = field(default_factory=dict, compare=False)
    replaced: Mapping[str, TensorRef] = field(default_factory=dict, compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)
    prefix: SoftPrefix | None = field(default=None, compare=False)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (folder / CONFIG_FILE).exists()


def holds_prefix(folder: Path) -> bool:
    """Whether a folder holds an adapter that changes no weights, but stands before the text."""
    return is_adapter(folder) and is_prefix(read_adapter_config(folder, where=str(folder)))


def open_adapter(
    label: str,
    spec: str,
    folder: Path,
    base: ModelSource,
    *,
    revision: str | None = None,
    elsewhere: Elsewhere | None = None,
) -> AdapterSource:
    """Read an adapter folder as changes of a base model. Only headers are read; where it lacks the weights, that `elsewhere`.

    Raises SourceError when the adapter is damaged or contradicts itself, MismatchError when it is not for this base, and
    UnsupportedError when it does what no plain weight of the base can say.
    """
    where = f"{label} ({spec})"
    config = read_adapter_config(folder, where=where)  # before the weights, so that another kind of folder is named first
    if not is_prefix(config):
        parse_settings(config, where=where)
    file = folder / WEIGHTS_FILE if elsewhere is not None else _weights_file(folder, where=where)
    tensors = WeightFiles([file], where, elsewhere).tensors()
    if is_prefix(config):
        prefix = read_prefix(config, tensors, base, where=where)
        return AdapterSource(label, spec, folder, revision, config, tensors, prefix=prefix)
    naming = naming_of((peft_plain(name) for name in tensors), where=where)
    settings = parse_settings(config, where=where, naming=naming)
    rules = _Rules(where, settings, base, tensors, naming)
    changes, replaced, notes = rules.changes(), rules.replaced(), tuple(rules.notes())
    if not changes and not replaced:
        raise damaged("the adapter changes nothing", where, f"no tensor in {WEIGHTS_FILE}")
    bias_changes, beside = rules.bias_changes(changes), rules.beside
    return AdapterSource(label, spec, folder, revision, config, tensors, changes, bias_changes, replaced, notes, beside=beside)


def _weights_file(folder: Path, *, where: str) -> Path:
    if (folder / WEIGHTS_FILE).exists():
        return folder / WEIGHTS_FILE
    if (folder / "adapter_model.bin").exists():
        raise SourceError(
            "the adapter is pickled, which can run code when opened; modekit reads safetensors only",
            where=where,
            found="adapter_model.bin",
            expected=WEIGHTS_FILE,
            remedy="convert it once where you trust the file: load it with PEFT and save_pretrained to a new folder",
        )
    raise damaged("the adapter has no weights", where, expected=WEIGHTS_FILE)


class _Rules(Resolution):
    """By which rule the adapter changes each weight."""

    def changes(self) -> dict[str, Change]:
        """Name of a weight of the base -> its change."""
        found: dict[str, Change] = {}
        for module, parts in self.parts.items():
            weights = {name: self.whole.get(name, ref) for name, ref in self.weights(module).items()}
            total, start = sum(ref.shape[0] for ref in weights.values()), 0
            for name, ref in weights.items():
                rows = None if len(weights) == 1 else (start, start + ref.shape[0])
                change = self._scaling if self.is_ia3 else self._low_rank
                found[name] = change(module, parts, (total, ref.shape[1]), rows)
                start += ref.shape[0]
        return found

    def bias_changes(self, changes: Mapping[str, Change]) -> dict[str, Change]:
        """Name of a bias of the base -> the change of its module, when that reaches the bias."""
        found = {}
        for name, change in changes.items():
            bias = f"{module_of(name)}.bias"
            reaches = change.bias is not None if isinstance(change, LowRank) else change.axis == "rows"
            if reaches and bias in self.base.tensors:
                found[bias] = change
        return found

    def notes(self) -> Iterator[str]:
        """Remarks for the user."""
        if self.settings.fan_in_fan_out:
            yield "fan_in_fan_out has no effect: PEFT ignores it on linear layers and embeddings"
        own = [name for name in self.whole if module_of(name) in self.parts and name.endswith(".weight")]
        if own:
            yield f"the adapter brings its own copy of {shortened(', '.join(own))}, which replaces the base's before the change"
        if isinstance(self.settings, LoraSettings):
            unused = self.settings.unused_patterns(self.parts)
            if unused:
                said = shortened(", ".join(unused))
                yield f"no adapted module matches these entries of rank_pattern or alpha_pattern: {said}"

    def _low_rank(
        self, module: str, parts: Mapping[str, TensorRef], shape: tuple[int, int], rows: tuple[int, int] | None
    ) -> LowRank:
        settings = self.settings
        assert isinstance(settings, LoraSettings)
        is_embedding = self.family.looks_up(module)
        other_way = is_embedding or self.family.keeps_columns(module)
        rank, (inputs, outputs) = settings.rank(module), shape if other_way else shape[::-1]
        names = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
        expected: dict[str, tuple[int, ...]] = {names[0]: (rank, inputs), names[1]: (outputs, rank)}
        if settings.use_dora:
            expected["lora_magnitude_vector"] = (outputs,)
        if settings.lora_bias:
            expected["lora_B.bias"] = (outputs,)
        self._check_parts(module, parts, expected)
        for name, axis in zip(names, (0, 1), strict=True):
            if len(parts[name].shape) == 2 and parts[name].shape[axis] != rank:
                where, found = f"{self.where}: {parts[name].name}", parts[name].shape[axis]
                raise damaged(
                    "the rank in the adapter file is not that in its config", where, found, f"{rank}, by r and rank_pattern"
                )
        self._check_shapes(parts, expected)
        if settings.lora_bias:
            self._check_has_bias(module)
        magnitude, bias = parts.get("lora_magnitude_vector"), parts.get("lora_B.bias")
        return LowRank(parts[names[0]], parts[names[1]], settings.scale(module), rows, magnitude, bias, transposed=other_way)

    def _scaling(
        self, module: str, parts: Mapping[str, TensorRef], shape: tuple[int, int], rows: tuple[int, int] | None
    ) -> Scaling:
        assert isinstance(self.settings, IA3Settings)
        scales_inputs = self.settings.scales_inputs(module)
        expected = {"ia3_l": (1, shape[1]) if scales_inputs else (shape[0], 1)}
        self._check_parts(module, parts, expected)
        self._check_shapes(parts, expected)
        return Scaling(parts["ia3_l"], "columns") if scales_inputs else Scaling(parts["ia3_l"], "rows", rows)

    def _check_parts(self, module: str, parts: Mapping[str, TensorRef], expected: Iterable[str]) -> None:
        """Raise SourceError unless the module has exactly the tensors that the config asks for."""
        missing = sorted(set(expected) - parts.keys())
        if missing:
            where, there = f"{self.where}: {module}", ", ".join(sorted(parts))
            raise damaged("the adapter lacks a part of a module", where, there, f"{', '.join(missing)} as well")
        for part in sorted(parts.keys() - set(expected)):
            self.refuse_unexplained(parts[part], "the config does not ask for it")

    def _check_shapes(self, parts: Mapping[str, TensorRef], expected: Mapping[str, tuple[int, ...]]) -> None:
        for part, shape in expected.items():
            if parts[part].shape != shape:
                self.refuse_shape(parts[part], shape)

    def _check_has_bias(self, module: str) -> None:
        """Like PEFT's merge, which has no place for lora_bias on a layer without a bias."""
        for member in self.members(module):
            if f"{member}.bias" not in self.base.tensors:
                raise UnsupportedError(
                    "the adapter adds a bias (lora_bias) to a layer that has none",
                    where=f"{self.where}: {member}",
                    remedy="train the adapter without lora_bias",
                )
