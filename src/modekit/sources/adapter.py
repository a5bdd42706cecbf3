"""PEFT adapter folders read by header: which weights of the base an adapter changes, and by which rule.

Nothing here imports peft or torch, and nothing reads a tensor. Tensors are named as PEFT names them when it saves
(`get_peft_model_state_dict`); what it would not load, or not load into the same place, is refused, never ignored. Its merged
models are the oracle of tests/sources/test_adapters.py.

Shape legend: O output, I input of a linear layer, R rank, V vocabulary, D hidden.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from modekit.errors import MismatchError, SourceError, UnsupportedError
from modekit.sources.adapter_config import (
    CONFIG_FILE,
    SAVE_AGAIN,
    IA3Settings,
    LoraSettings,
    Settings,
    parse_settings,
    read_adapter_config,
    shortened,
)
from modekit.sources.model import DTYPE_NAMES, ModelSource, TensorRef, read_header
from modekit.sources.names import EMBEDDING, HEAD, layers_of, module_of, split_layer, weight_of

WEIGHTS_FILE = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector|ia3_l)"
)
_FUSED: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Fused projection -> the projections whose rows it stacks, in order (Phi3's layout)."""


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
        notes: what a user may want to know.
    """

    changes: Mapping[str, Change] = field(default_factory=dict, compare=False)
    bias_changes: Mapping[str, Change] = field(default_factory=dict, compare=False)
    replaced: Mapping[str, TensorRef] = field(default_factory=dict, compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (folder / CONFIG_FILE).exists()


def open_adapter(label: str, spec: str, folder: Path, base: ModelSource, *, revision: str | None = None) -> AdapterSource:
    """Read an adapter folder as changes of a base model. Only headers are read.

    Raises SourceError when the adapter is damaged or contradicts itself, MismatchError when it is not for this base, and
    UnsupportedError when it does what no plain weight of the base can say.
    """
    where = f"{label} ({spec})"
    config = read_adapter_config(folder, where=where)
    settings = parse_settings(config, where=where)
    tensors = read_header(_weights_file(folder, where=where), where=where)
    try:
        resolved = _Resolution(where, settings, base, tensors)
        changes, replaced, notes = resolved.changes(), resolved.replaced(), tuple(resolved.notes())
    except (re.error, OverflowError, RecursionError) as error:
        raise SourceError(
            "a pattern in adapter_config.json is no regular expression", where=f"{where}: {CONFIG_FILE}", found=error,
            remedy=SAVE_AGAIN,
        ) from None  # fmt: skip
    if not changes and not replaced:
        raise SourceError("the adapter changes nothing", where=where, found=f"no tensor in {WEIGHTS_FILE}", remedy=SAVE_AGAIN)
    return AdapterSource(
        label, spec, folder, revision, config, tensors, changes, resolved.bias_changes(changes), replaced, notes
    )


def _weights_file(folder: Path, *, where: str) -> Path:
    if (folder / WEIGHTS_FILE).exists():
        return folder / WEIGHTS_FILE
    if (folder / "adapter_model.bin").exists():
        raise SourceError(
            "the adapter is pickled, which can run code when opened; modekit reads safetensors only", where=where,
            found="adapter_model.bin", expected=WEIGHTS_FILE,
            remedy="convert it once where you trust the file: load it with PEFT and save_pretrained to a new folder",
        )  # fmt: skip
    raise SourceError("the adapter has no weights", where=where, expected=WEIGHTS_FILE, remedy=SAVE_AGAIN)


@dataclass(frozen=True)
class _Resolution:
    """What the tensors of one adapter file mean for one base model."""

    where: str
    settings: Settings
    base: ModelSource
    tensors: Mapping[str, TensorRef]

    def __post_init__(self) -> None:
        for ref in self.tensors.values():
            if ref.dtype not in DTYPE_NAMES:
                raise SourceError(
                    "tensor dtype cannot be used", where=f"{self.where}: {ref.name}", found=ref.dtype,
                    expected=", ".join(DTYPE_NAMES), remedy="save the adapter in bf16, fp16 or fp32",
                )  # fmt: skip
        self._check_targets_are_there()

    def changes(self) -> dict[str, Change]:
        """Name of a weight of the base -> its change."""
        found: dict[str, Change] = {}
        for module, parts in self._parts.items():
            weights = self._weights(module)
            total, start = sum(ref.shape[0] for ref in weights.values()), 0
            for name, ref in weights.items():
                rows = None if len(weights) == 1 else (start, start + ref.shape[0])
                change = self._scaling if self._is_ia3 else self._low_rank
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

    def replaced(self) -> dict[str, TensorRef]:
        """Name of a tensor of the base -> the tensor of the file that takes its place."""
        names = self._base_names | {weight_of(HEAD)}  # PEFT copies the head of a tied base, too
        missing = sorted(name for name in names if self.settings.saves(module_of(name)) and name not in self._whole)
        if missing:
            raise SourceError(
                "the adapter file lacks tensors of modules_to_save", where=self.where, found=_some(missing),
                expected=f"whole copies of modules_to_save: {shortened(self.settings.modules_to_save)}", remedy=SAVE_AGAIN,
            )  # fmt: skip
        found = dict(self._whole)
        if self._is_tied and weight_of(HEAD) in found:
            head = found.pop(weight_of(HEAD))  # one parameter with the embedding, saved under both names
            found.setdefault(weight_of(EMBEDDING), head)
        for name, ref in found.items():
            expected = self.base.tensors[name].shape
            if ref.shape != expected:
                self._refuse_shape(ref, expected)
        return found

    def notes(self) -> Iterator[str]:
        """Remarks for the user."""
        if self.settings.fan_in_fan_out:
            yield "fan_in_fan_out has no effect: PEFT ignores it on linear layers and embeddings"
        own = [name for name in self._whole if module_of(name) in self._parts and name.endswith(".weight")]
        if own:
            yield f"the adapter brings its own copy of {', '.join(own)}, which replaces the base's before the change"
        if isinstance(self.settings, LoraSettings):
            unused = self.settings.unused_patterns(self._parts)
            if unused:
                yield f"no adapted module matches these entries of rank_pattern or alpha_pattern: {', '.join(unused)}"

    @cached_property
    def _is_ia3(self) -> bool:
        return isinstance(self.settings, IA3Settings)

    @cached_property
    def _is_tied(self) -> bool:
        return bool(self.base.config.get("tie_word_embeddings")) or weight_of(HEAD) not in self.base.tensors

    @cached_property
    def _base_names(self) -> frozenset[str]:
        """Names of tensors that the adapter may change; the head of a tied base is not one of its own."""
        return frozenset(name for name in self.base.tensors if not (self._is_tied and name == weight_of(HEAD)))

    @cached_property
    def _base_modules(self) -> frozenset[str]:
        return frozenset(module_of(name) for name in self._base_names if name.endswith(".weight"))

    @cached_property
    def _fused_modules(self) -> dict[str, tuple[str, ...]]:
        """Fused module that the base lacks -> the modules of the base that it stands for."""
        found = {}
        for module in self._base_modules:
            parent, _, last = module.rpartition(".")
            for fused, parts in _FUSED.items():
                members = tuple(f"{parent}.{part}" for part in parts)
                if last == parts[0] and self._base_modules.issuperset(members):
                    found[f"{parent}.{fused}"] = members
        return {fused: members for fused, members in found.items() if fused not in self._base_modules}

    @cached_property
    def _by_name(self) -> dict[str, TensorRef]:
        """Tensors of the file under their name in the base model, with what PEFT appends."""
        found: dict[str, TensorRef] = {}
        for key, ref in self.tensors.items():
            name = key.removeprefix(_PREFIX)
            if name in found:
                raise SourceError(
                    "two tensors of the adapter mean the same", where=f"{self.where}: {name}",
                    found=f"{found[name].name} and {key}", remedy=SAVE_AGAIN,
                )  # fmt: skip
            found[name] = ref
        return found

    @cached_property
    def _parts(self) -> dict[str, dict[str, TensorRef]]:
        """Adapted module -> its adapter tensors by part."""
        found: dict[str, dict[str, TensorRef]] = {}
        for name, ref in self._by_name.items():
            match = _PART.fullmatch(name)
            if match is None:
                continue
            module = match["module"]
            if self._is_tied and module in {EMBEDDING, HEAD}:
                self._refuse_tied(ref)
            if module not in self._base_modules and module not in self._fused_modules:
                self._refuse_unknown(ref, module)
            if not self.settings.targets(module):
                self._refuse_unexplained(ref, "its module is no target by target_modules and exclude_modules")
            found.setdefault(module, {})[match["part"]] = ref
        return found

    @cached_property
    def _whole(self) -> dict[str, TensorRef]:
        """Whole tensors of the file by their name in the base: biases, modules_to_save, saved embeddings."""
        found: dict[str, TensorRef] = {}
        for name, ref in self._by_name.items():
            if _PART.fullmatch(name) or self._is_inside_wrapper(name):
                continue
            module, _, last = name.rpartition(".")
            own = module.removesuffix(".base_layer")  # the adapted module itself lies under base_layer
            is_tied = self._is_tied and f"{own}.{last}" in {weight_of(EMBEDDING), weight_of(HEAD)}
            if is_tied and self.settings.saves(own) and not self.settings.ties_copies:
                self._refuse_tied(ref)
            if not is_tied and f"{own}.{last}" not in self._base_names:
                self._refuse_unknown(ref, own)
            if (own in self._parts) != (own != module):
                self._refuse_unexplained(ref, "PEFT gives it no place beside the module's adapter")
            found[f"{own}.{last}"] = ref
        return found

    def _is_inside_wrapper(self, name: str) -> bool:
        """With bias: all, PEFT saves biases of modules_to_save three times; two of the names are never read again."""
        module, _, last = name.rpartition(".")
        for inside in (".original_module", ".modules_to_save"):
            own = module.removesuffix(inside)
            if own != module and self.settings.saves(own) and f"{own}.{last}" in self._by_name:
                return True
        return False

    def _weights(self, module: str) -> dict[str, TensorRef]:
        """The base's weights, (O, I) each, that an adapted module stands for."""
        members = self._fused_modules.get(module, (module,))
        weights = {f"{member}.weight": self.base.tensors[f"{member}.weight"] for member in members}
        for name, ref in weights.items():
            if len(ref.shape) != 2 or (self._is_ia3 and module == EMBEDDING):
                raise UnsupportedError(
                    "the adapter is on a module that is no linear layer" + ("" if self._is_ia3 else " or embedding"),
                    where=f"{self.where}: {name}", found=f"shape {list(ref.shape)}", expected="a 2-D weight",
                    remedy="train the adapter on linear layers",
                )  # fmt: skip
        if members != (module,):
            twice = [member for member in members if member in self._parts]
            if twice:
                raise SourceError(
                    "the adapter has both a fused module and its parts", where=self.where,
                    found=f"{module} and {_some(twice)}", remedy=SAVE_AGAIN,
                )  # fmt: skip
        return weights

    def _low_rank(
        self, module: str, parts: Mapping[str, TensorRef], shape: tuple[int, int], rows: tuple[int, int] | None
    ) -> LowRank:
        settings = self.settings
        assert isinstance(settings, LoraSettings)
        is_embedding = module == EMBEDDING
        rank, (inputs, outputs) = settings.rank(module), shape if is_embedding else shape[::-1]
        names = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
        expected: dict[str, tuple[int, ...]] = {names[0]: (rank, inputs), names[1]: (outputs, rank)}
        if settings.use_dora:
            expected["lora_magnitude_vector"] = (outputs,)
        if settings.lora_bias:
            expected["lora_B.bias"] = (outputs,)
        self._check_parts(module, parts, expected)
        for name, axis in zip(names, (0, 1), strict=True):
            if len(parts[name].shape) == 2 and parts[name].shape[axis] != rank:
                raise SourceError(
                    "the rank in the adapter file is not that in its config", where=f"{self.where}: {parts[name].name}",
                    found=parts[name].shape[axis], expected=f"{rank}, by r and rank_pattern", remedy=SAVE_AGAIN,
                )  # fmt: skip
        self._check_shapes(parts, expected)
        if settings.lora_bias:
            self._check_has_bias(module)
        magnitude, bias = parts.get("lora_magnitude_vector"), parts.get("lora_B.bias")
        return LowRank(parts[names[0]], parts[names[1]], settings.scale(module), rows, magnitude, bias, transposed=is_embedding)

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
            raise SourceError(
                "the adapter lacks a part of a module", where=f"{self.where}: {module}", found=", ".join(sorted(parts)),
                expected=", ".join(missing) + " as well", remedy=SAVE_AGAIN,
            )  # fmt: skip
        for part in sorted(parts.keys() - set(expected)):
            self._refuse_unexplained(parts[part], "the config does not ask for it")

    def _check_shapes(self, parts: Mapping[str, TensorRef], expected: Mapping[str, tuple[int, ...]]) -> None:
        for part, shape in expected.items():
            if parts[part].shape != shape:
                self._refuse_shape(parts[part], shape)

    def _check_has_bias(self, module: str) -> None:
        """Like PEFT's merge, which has no place for lora_bias on a layer without a bias."""
        for member in self._fused_modules.get(module, (module,)):
            if f"{member}.bias" not in self.base.tensors:
                raise UnsupportedError(
                    "the adapter adds a bias (lora_bias) to a layer that has none", where=f"{self.where}: {member}",
                    remedy="train the adapter without lora_bias",
                )  # fmt: skip

    def _check_targets_are_there(self) -> None:
        """Raise SourceError when the config targets a module that the file does not adapt."""
        fused = {member for module in self._parts for member in self._fused_modules.get(module, ())}
        modules = self._base_modules | {HEAD}
        if self.settings.takes_all_linear:
            modules = frozenset(module for module in modules - {HEAD} if len(self.base.tensors[weight_of(module)].shape) == 2)
        missing = {module for module in modules - self._parts.keys() - fused if self.settings.targets(module)}
        # A fused target that the base lacks means nothing to PEFT, unless the file shows that the adapter is for fused modules.
        kinds = {module.rpartition(".")[2] for module in self._parts if module in self._fused_modules}
        fused_modules = {module for module in self._fused_modules if module.rpartition(".")[2] in kinds}
        missing |= {module for module in fused_modules - self._parts.keys() if self.settings.targets(module)}
        if missing:
            raise SourceError(
                "the adapter file lacks modules that its config targets", where=self.where, found=_some(sorted(missing)),
                expected=f"target_modules: {shortened(self.settings.target_modules)}", remedy=SAVE_AGAIN,
            )  # fmt: skip

    def _refuse_tied(self, ref: TensorRef) -> None:
        """PEFT computes both apart until it merges; then one change lands in both, so that no tied model is the adapter's."""
        raise UnsupportedError(
            "the adapter changes the embedding or the head, which are one tensor in this base model",
            where=f"{self.where}: {ref.name}", found="tied embeddings in the base model",
            remedy="untie the base model first (save it with tie_word_embeddings: false), or train the adapter without "
            "embed_tokens and lm_head",
        )  # fmt: skip

    def _refuse_unknown(self, ref: TensorRef, module: str) -> None:
        where = f"{self.where}: {ref.name}"
        layers, (layer, _) = layers_of(self._base_names), split_layer(module)
        if layer is not None and layer >= layers:
            raise MismatchError(
                "the adapter has more layers than the base model", where=where, found=f"layer {layer}",
                expected=f"{layers} layers", remedy="use an adapter that was trained on this base model",
            )  # fmt: skip
        raise MismatchError(
            "the adapter has a tensor for a part that the base model lacks", where=where, found=module,
            expected=f"a module of {self.base.spec} ({self.base.config.get('model_type')})",
            remedy="use an adapter that was trained on this base model",
        )  # fmt: skip

    def _refuse_unexplained(self, ref: TensorRef, why: str) -> None:
        raise SourceError(
            "a tensor of the adapter would be lost", where=f"{self.where}: {ref.name}", found=why,
            expected=f"only tensors that {CONFIG_FILE} explains", remedy=SAVE_AGAIN,
        )  # fmt: skip

    def _refuse_shape(self, ref: TensorRef, expected: tuple[int, ...]) -> None:
        raise MismatchError(
            "the adapter does not fit the base model's sizes", where=f"{self.where}: {ref.name}", found=list(ref.shape),
            expected=f"{list(expected)}, for {self.base.spec}", remedy="use an adapter that was trained on this base model",
        )  # fmt: skip


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
