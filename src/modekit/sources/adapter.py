"""PEFT's LoRA adapters read by config and header: which weights of the base one changes, and how.

Tensors are named as PEFT names them when it saves (`get_peft_model_state_dict`). Which modules an adapter changes, and with
which rank, its file says; a setting whose effect on the weights is not known here, and a tensor that has no place in the base,
are refused, never ignored. Nothing here imports peft or torch. PEFT's merged models are the oracle of
tests/sources/test_adapters.py.

Shape legend: O output, I input of a linear layer, R rank, V vocabulary, D hidden.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from modekit.errors import MismatchError, SourceError, UnsupportedError
from modekit.files.read import UNREADABLE, read_json
from modekit.sources.adapted import Adapted, Parts, wrapped
from modekit.sources.config import is_mixture
from modekit.sources.contents import read_header
from modekit.sources.families import family_of
from modekit.sources.family import UNTIE, Family
from modekit.sources.header import TensorRef, check_floats
from modekit.sources.lora_settings import LoraSettings, Patterns, damaged, lora_settings
from modekit.sources.names import layers_of, module_of, split_layer, weight_of
from modekit.sources.source import ModelSource
from modekit.sources.towers import Naming, naming_of
from modekit.sources.weight_files import no_weights

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_GIVE_SAVED = "give an adapter that PEFT saved (save_pretrained)"
_SAME_BASE = "use an adapter that was trained on this base model"
_JOIN = (
    "let PEFT join it, where it was trained on single experts as transformers 4 had them: with transformers 5, "
    "PeftModel.from_pretrained(BASE_MODEL, ADAPTER).save_pretrained(NEW)"
)
_LARGEST = 2**20  # bytes of a config: ten times what one with a rank for every module of a large model has
_PREFIX = "base_model.model."
_PART = re.compile(
    r"(?P<module>.+)\."
    r"(?P<part>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
)
_COPIES = (".original_module", ".modules_to_save")
"""With bias: all, PEFT saves biases of modules_to_save three times; these two of the names are never read again."""


@dataclass(frozen=True)
class LowRank:
    """LoRA on one weight of the base: W' = W + scale * B A, for W (O, I), A (R, I), B (O, R).

    On fused experts, W (E, O, I), each has its own: W'_e = W_e + scale * B_e A_e, where A (E R, I) has the expert slowest and
    B (O, R E) has it fastest (PEFT's `ParamWrapper.get_delta_weight`).

    Attributes:
        a: A. For an embedding, (R, V).
        b: B. For an embedding, (D, R).
        scale: alpha / R, or alpha / sqrt(R) for rsLoRA.
        magnitude: DoRA's m, (O,): W' = m * (W + scale * B A) / norms of its rows. For an embedding, (D,) and columns.
        transposed: an embedding, W (V, D), or fused experts, W (E, I, O): W' = W + scale * (B A)^T.
        experts: E; 0 for a matrix.
        member: of fused experts the one that this is of; None: all.
        rows: of a member, the rows of B that are for its gate or its up; None: all.
    """

    a: TensorRef
    b: TensorRef
    scale: float
    magnitude: TensorRef | None = None
    transposed: bool = False
    experts: int = 0
    member: int | None = None
    rows: tuple[int, int] | None = None

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[0] // (self.experts or 1)

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """All tensors that the change is computed from."""
        return tuple(ref for ref in (self.a, self.b, self.magnitude) if ref is not None)


@dataclass(frozen=True)
class AdapterSource(ModelSource):
    """An adapter on disk and what it does to one base model. `tensors` and `config` are the adapter's own.

    Replacing comes first: a tensor in both `replaced` and `changes` is the replacement with the change on top.

    Attributes:
        changes: name of a weight of the base, a matrix or fused experts -> change.
        replaced: name of a tensor of the base -> the whole tensor that takes its place.
    """

    changes: Mapping[str, LowRank] = field(compare=False)
    replaced: Mapping[str, TensorRef] = field(compare=False)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (folder / CONFIG_FILE).exists()


def open_adapter(label: str, spec: str, folder: Path, base: ModelSource, *, revision: str | None = None) -> AdapterSource:
    """Read an adapter folder as changes of a base model. Only headers are read.

    Raises SourceError when the adapter is damaged or contradicts itself, MismatchError when it is not for this base, and
    UnsupportedError when it does what no plain weight of the base can say.
    """
    where = f"{label} ({spec})"
    config = read_adapter_config(folder, where=where)  # before the weights, so that another kind of folder is named first
    settings = lora_settings(config, where=f"{where}: {CONFIG_FILE}")
    if not (folder / WEIGHTS_FILE).exists():
        raise no_weights([path.name for path in folder.iterdir()], where=where)
    tensors = read_header(folder / WEIGHTS_FILE, where=where)
    check_floats(tensors.values(), where=where)
    naming = naming_of([name.removeprefix(_PREFIX) for name in tensors])
    reading = _Reading(where, settings, base, naming)
    beside = reading.sort(tensors)
    changes = reading.changes()
    replaced = reading.replaced()
    if not changes and not replaced:
        raise damaged("the adapter changes nothing", where, f"no tensor in {WEIGHTS_FILE}")
    return AdapterSource(label, spec, folder, revision, config, tensors, changes, replaced, beside=beside)


def read_adapter_config(folder: Path, *, where: str) -> dict[str, object]:
    """An adapter's config as data. Raises SourceError when it is missing, not JSON, or names no peft_type."""
    try:
        config = read_json(folder / CONFIG_FILE, _LARGEST)
    except FileNotFoundError:
        if (folder / "config.json").exists():
            raise SourceError(
                "this is a full model, not an adapter",
                where=where,
                remedy="name it as model: in place of adapter: in the recipe, or by --model",
            ) from None
        raise SourceError(f"{CONFIG_FILE} is missing", where=where, remedy=_GIVE_SAVED) from None
    except UNREADABLE as error:
        raise damaged(f"{CONFIG_FILE} cannot be read", where, error) from None
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise SourceError(f"{CONFIG_FILE} names no peft_type", where=where, expected="LORA", remedy=_GIVE_SAVED)
    return config


class _Reading:
    """What the tensors of one adapter file mean for one base model; `naming` is that of the model it was trained on.

    Everything here raises SourceError, MismatchError or UnsupportedError.
    """

    def __init__(self, where: str, settings: LoraSettings, base: ModelSource, naming: Naming) -> None:
        self._where = where
        self._settings = settings
        self._base = base
        self._naming = naming
        self._parts: dict[str, dict[str, TensorRef]] = {}  # adapted module -> its adapter tensors by part
        self._whole: dict[str, TensorRef] = {}  # saved modules, biases, embeddings: by their name in the base
        self._patterns = Patterns()

    @cached_property
    def _family(self) -> Family:
        return family_of(self._base.config, where=self._base.where)

    @cached_property
    def _is_tied(self) -> bool:
        return self._family.is_tied(self._base)

    @property
    def _ends(self) -> tuple[str, str]:
        """Modules of embedding and head."""
        return self._family.embedding, self._family.head

    @cached_property
    def _base_names(self) -> frozenset[str]:
        """Names of tensors that the adapter may change; the head of a tied base is not one of its own."""
        head = weight_of(self._family.head)
        return frozenset(name for name in self._base.tensors if not (self._is_tied and name == head))

    def sort(self, tensors: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
        """Take every tensor by the module that it belongs to. Gives those that are for no part of the language model."""
        beside: dict[str, TensorRef] = {}
        taken: dict[str, str] = {}
        for key, ref in tensors.items():
            plain = key.removeprefix(_PREFIX)
            name = self._naming.plain(plain)
            if name is None:
                beside[plain] = ref
                continue
            if (first := taken.setdefault(name, key)) != key:
                raise damaged("two tensors of the adapter mean the same", f"{self._where}: {name}", f"{first} and {key}")
            match = _PART.fullmatch(name)
            if match is not None:
                self._parts.setdefault(match["module"], {})[match["part"]] = ref
            elif not name.rpartition(".")[0].endswith(_COPIES):
                self._whole[name] = ref
        return beside

    def changes(self) -> dict[str, LowRank]:
        """Name of a weight of the base -> its change."""
        found: dict[str, LowRank] = {}
        wrapped = self._wrapped()
        for module, parts in self._parts.items():
            first = next(iter(parts.values()))
            weight = wrapped.get(module)
            if (self._is_tied and module in self._ends) or (self._family.shares and module == self._ends[0]):
                raise self._tied(first)
            if weight is None:
                self._check_layer(module, first)
                weight = self._module(module, first)
            found[weight.name] = self._change(module, parts, weight)
        return found

    def _check_layer(self, module: str, first: TensorRef) -> None:
        """Raise SourceError for a part of a layer that PEFT would not adapt, and would drop without a word."""
        layers = self._settings.layers_to_transform
        layer, _ = split_layer(module)
        if layers in (None, []) or layer is None or self._naming.named(module) in (self._settings.target_modules or ()):
            return
        number = int(str(layer).rpartition(".")[2])
        if number not in (layers if isinstance(layers, list) else [layers]):
            raise self._unexplained(first, f"layers_to_transform: {layers} leaves layer {number} out")

    def _module(self, module: str, first: TensorRef) -> Adapted:
        """The weight of a module that is adapted as a whole."""
        name = weight_of(module)
        found = self._family
        if name not in self._base_names:
            raise self._unknown(first, module)
        shape = self._whole.get(weight_of(f"{module}.base_layer"), self._base.tensors[name]).shape
        if len(shape) != 2:
            raise UnsupportedError(
                "the adapter is on a module that is no linear layer or embedding",
                where=f"{self._where}: {name}",
                found=f"shape {list(shape)}",
                expected="a 2-D weight",
                remedy="train the adapter on linear layers",
            )
        looked_up = found.looks_up(module)
        return Adapted(name, shape, self._naming.named(module), looked_up or found.keeps_columns(module), looked_up)

    def _wrapped(self) -> dict[str, Adapted]:
        """The parameters that `target_parameters` names, of matrices and fused experts, in the order of the class."""
        ends = tuple(f".{each}" for each in self._settings.target_parameters or ())
        weights = list[Adapted]()
        for name in (self._family.tensors or self._base.tensors) if ends else ():
            shape = self._base.tensors[name].shape if name in self._base_names else ()
            key = self._naming.named(name)
            if len(shape) in (2, 3) and f".{key}".endswith(ends):
                turned = len(shape) == 3 and self._family.keeps_columns(module_of(name))
                rank = self._said("rank_pattern", key, self._settings.r) if len(shape) == 3 else 0
                weights.append(Adapted(name, shape, key, turned, rank=int(rank)))
        return wrapped(self._parts, weights, self._where)

    def _change(self, module: str, parts: Parts, weight: Adapted) -> LowRank:
        """The change of a weight, by exactly the tensors that the config asks for."""
        a, b = weight.parts
        expected = weight.expected(parts)
        expected |= {"lora_magnitude_vector": expected[b][:1]} if self._settings.use_dora else {}
        missing = sorted(expected.keys() - parts.keys())
        if missing:
            raise damaged(
                "the adapter lacks a part of a module",
                f"{self._where}: {module}",
                ", ".join(sorted(parts)),
                f"{', '.join(missing)} as well",
            )
        for part, ref in parts.items():
            if part not in expected:
                raise self._unexplained(ref, "the config does not ask for it")
            if ref.shape != expected[part]:
                raise self._other_shape(ref, expected[part])
        rank = expected[a][0] // (weight.experts or 1) or 1
        alpha = self._said("alpha_pattern", weight.key, self._settings.lora_alpha)
        scale = alpha / (math.sqrt(rank) if self._settings.use_rslora else rank)
        magnitude = parts.get("lora_magnitude_vector")
        return LowRank(parts[a], parts[b], scale, magnitude, weight.turned, weight.experts)

    def _said(self, patterns: Literal["rank_pattern", "alpha_pattern"], module: str, default: float) -> float:
        """The first pattern counts that is a module's name or its end (PEFT's `get_pattern_key`)."""
        import regex

        for pattern, value in (getattr(self._settings, patterns) or {}).items():
            try:
                if self._patterns.match(pattern, module):
                    return float(value)
            except (regex.error, TimeoutError, MemoryError, OverflowError, RecursionError) as error:
                raise damaged(
                    "a pattern is no regular expression, or the patterns take too long to match",
                    f"{self._where}: {CONFIG_FILE}: {patterns}",
                    f"{pattern[:200]}: {error}",
                ) from None
        return default

    def replaced(self) -> dict[str, TensorRef]:
        """Name of a tensor of the base -> the tensor of the file that takes its place."""
        found: dict[str, TensorRef] = {}
        embedding, head = map(weight_of, self._ends)
        for name, ref in self._whole.items():
            module, _, leaf = name.rpartition(".")
            own = module.removesuffix(".base_layer")  # the adapted module itself lies under base_layer
            is_tied = self._is_tied and own in self._ends and leaf == "weight"
            saved = self._naming.named(own).endswith(tuple(self._settings.modules_to_save or ()))
            is_shared = self._family.shares and own == self._ends[0]
            if saved and (is_shared or (is_tied and not self._settings.ensure_weight_tying)):
                raise self._tied(ref)
            if not is_tied and f"{own}.{leaf}" not in self._base_names:
                raise self._unknown(ref, own)
            if (own in self._parts) != (own != module):
                raise self._unexplained(ref, "PEFT gives it no place beside the module's adapter")
            found[f"{own}.{leaf}"] = ref
        if self._is_tied and head in found:  # one parameter with the embedding, saved under both names
            found.setdefault(embedding, found[head])
            del found[head]
        # Of what has a row for each token the adapter may have more or fewer than the base.
        of_tokens = () if self._family.shares else (embedding, head, f"{self._family.head}.bias")
        for name, ref in found.items():
            expected = self._base.tensor(name).shape
            if ref.shape != expected and not (name in of_tokens and ref.shape[1:] == expected[1:]):
                raise self._other_shape(ref, expected)
        return found

    # --- errors

    def _tied(self, ref: TensorRef) -> UnsupportedError:
        """PEFT computes both apart until it merges; then one change lands in both, so that no tied model is the adapter's."""
        return UnsupportedError(
            "the adapter changes an embedding or a head that this base model shares",
            where=f"{self._where}: {ref.name}",
            remedy=f"train the adapter without embeddings and lm_head, or {UNTIE}",
        )

    def _unknown(self, ref: TensorRef, module: str) -> MismatchError:
        layers = layers_of(self._base_names)
        layer, _ = split_layer(module)
        if layer is not None and layer not in layers:
            return self._other_base("has more layers than the base model", ref, f"layer {layer}", f"{len(layers)} layers")
        mixed = ", itself a mixture of experts" if is_mixture(self._base.config) else ""
        expected = f"a module of {self._base.spec} ({self._base.config.get('model_type')}{mixed})"
        remedy = _JOIN if mixed and ".experts." in module else _SAME_BASE
        return self._other_base("has a tensor for a part that the base model lacks", ref, module, expected, remedy)

    def _other_shape(self, ref: TensorRef, expected: tuple[int, ...]) -> MismatchError:
        wanted = f"{list(expected)}, for {self._base.spec}"
        return self._other_base("does not fit the base model's sizes", ref, list(ref.shape), wanted)

    def _other_base(self, what: str, ref: TensorRef, found: object, expected: str, remedy: str = _SAME_BASE) -> MismatchError:
        return MismatchError(
            f"the adapter {what}",
            where=f"{self._where}: {ref.name}",
            found=found,
            expected=expected,
            remedy=remedy,
        )

    def _unexplained(self, ref: TensorRef, why: str) -> SourceError:
        return damaged(
            "a tensor of the adapter would be lost",
            f"{self._where}: {ref.name}",
            why,
            f"only tensors that {CONFIG_FILE} explains",
        )
