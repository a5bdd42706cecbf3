"""Which module of the base every tensor of an adapter file belongs to, and what it does there.

Tensors are named as PEFT names them when it saves (`get_peft_model_state_dict`); what has no place in the base is refused,
never ignored.

Shape legend: O output, I input of a linear layer, R rank, V vocabulary, D hidden.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from modekit.errors import MismatchError, SourceError, UnsupportedError, some_of
from modekit.files.typed import shortened
from modekit.sources.adapter_config import CONFIG_FILE, AdapterSettings, IA3Settings, LoraSettings, damaged, other_base
from modekit.sources.families import family_of
from modekit.sources.family import UNTIE, Family
from modekit.sources.header import TensorRef, check_floats
from modekit.sources.names import embedding_in, layers_of, module_of, split_layer, weight_of
from modekit.sources.rows import with_rows
from modekit.sources.source import ModelSource
from modekit.sources.towers import PLAIN, Naming

_PREFIX = "base_model.model."
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector|ia3_l)"
)
_TOKENS = ".token_adapter"
"""Behind the name of a module of which the file has rows of some tokens (trainable_token_indices)."""
_ROWS = f"{_TOKENS}.trainable_tokens_delta"
_COPIES = (".original_module", ".modules_to_save")
"""With bias: all, PEFT saves biases of modules_to_save three times; these two of the names are never read again."""
_FUSED: dict[str, tuple[str, ...]] = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
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
        vector: (O, 1) of outputs, or (1, I) of inputs (feedforward modules).
        axis: what of the weight as it is kept it scales: rows or columns.
        rows: the entries of `vector` that belong to this weight, as in `LowRank.rows`; None means all.
    """

    vector: TensorRef
    axis: Literal["rows", "columns"]
    rows: tuple[int, int] | None = None

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """All tensors that the change is computed from."""
        return (self.vector,)

    @property
    def of_outputs(self) -> bool:
        """Whether each output is scaled, and so the bias."""
        return self.vector.shape[1] == 1


Change = LowRank | Scaling


def peft_plain(key: str) -> str:
    """A tensor's name without what PEFT puts before all names."""
    return key.removeprefix(_PREFIX)


@dataclass(frozen=True)
class Rules:
    """What the tensors of one adapter file mean for one base model; `naming` is that of the model it was trained on.

    Raises SourceError, MismatchError or UnsupportedError when asked for what no base weight can say.
    """

    where: str
    settings: AdapterSettings
    base: ModelSource
    tensors: Mapping[str, TensorRef]
    naming: Naming

    # --- what the base has

    @cached_property
    def _family(self) -> Family:
        return family_of(self.base.config, where=self.base.where)

    @cached_property
    def _is_tied(self) -> bool:
        head = self._family.head
        return self._family.is_tied(self.base) or (head != "" and weight_of(head) not in self.base.tensors)

    @cached_property
    def _embedding(self) -> str:
        found = embedding_in(self.base.tensors)
        return found if weight_of(found) in self.base.tensors else self._family.embedding

    @cached_property
    def _ends(self) -> tuple[str, str]:
        """Names of the weights of embedding and head."""
        return weight_of(self._embedding), weight_of(self._family.head)

    @cached_property
    def _base_names(self) -> frozenset[str]:
        """Names of tensors that the adapter may change; the head of a tied base is not one of its own."""
        return frozenset(name for name in self.base.tensors if not (self._is_tied and name == self._ends[1]))

    def _members(self, module: str) -> tuple[str, ...]:
        """Modules of the base that an adapted module stands for: itself, or what a fused one stacks; none of another base."""
        if weight_of(module) in self._base_names:
            return (module,)
        parent, _, last = module.rpartition(".")
        members = tuple(f"{parent}.{part}" for part in _FUSED.get(last, ()))
        return members if members and self._base_names.issuperset(map(weight_of, members)) else ()

    # --- what the file has

    @cached_property
    def _by_name(self) -> dict[str, TensorRef]:
        """Tensors of the file under their name in the base model, with what PEFT appends."""
        check_floats(self.tensors.values(), where=self.where)
        found: dict[str, TensorRef] = {}
        for key, ref in self.tensors.items():
            name = self._name_in_base(key)
            if name is not None and found.setdefault(name, ref) is not ref:
                both = f"{found[name].name} and {key}"
                raise damaged("two tensors of the adapter mean the same", f"{self.where}: {name}", both)
        return found

    def _name_in_base(self, key: str) -> str | None:
        return peft_plain(key) if self.naming is PLAIN else self.naming.plain(peft_plain(key))

    @cached_property
    def beside(self) -> dict[str, TensorRef]:
        """Tensors of an adapter of a wrapper that are for no part of the language model, such as those of a vision tower."""
        return {peft_plain(key): ref for key, ref in self.tensors.items() if self._name_in_base(key) is None}

    @cached_property
    def _parts(self) -> dict[str, dict[str, TensorRef]]:
        """Adapted module -> its adapter tensors by part."""
        found: dict[str, dict[str, TensorRef]] = {}
        for name, ref in self._by_name.items():
            match = _PART.fullmatch(name)
            if match is not None:
                found.setdefault(match["module"], {})[match["part"]] = ref
        for module, parts in found.items():
            first, members = next(iter(parts.values())), self._members(module)
            if self._is_tied and module in {self._embedding, self._family.head}:
                raise self._tied(first)
            if self._family.shares and module == self._embedding:
                raise self._shared(first)
            if not members:
                raise self._unknown(first, module)
            twice = [member for member in members if member in found]
            if len(members) > 1 and twice:
                both = f"{module} and {some_of(twice)}"
                raise damaged("the adapter has both a fused module and its parts", self.where, both)
        return found

    @cached_property
    def _whole(self) -> dict[str, TensorRef]:
        """Whole tensors of the file by their name in the base: biases, modules_to_save, saved embeddings."""
        found: dict[str, TensorRef] = {}
        for name, ref in self._by_name.items():
            module, _, last = name.rpartition(".")
            if _PART.fullmatch(name) or module.endswith(_COPIES) or name.endswith(_ROWS):
                continue
            own = module.removesuffix(".base_layer").removesuffix(_TOKENS)  # the adapted module itself lies under base_layer
            is_tied = self._is_tied and f"{own}.{last}" in self._ends
            if is_tied and self.settings.saves(own) and not getattr(self.settings, "ensure_weight_tying", False):
                raise self._tied(ref)
            if self._family.shares and not is_tied and own == self._embedding and self.settings.saves(own):
                raise self._shared(ref)
            if not is_tied and f"{own}.{last}" not in self._base_names:
                raise self._unknown(ref, own)
            if (own in self._parts or own in self._token_rows) != (own != module):
                raise self._unexplained(ref, "PEFT gives it no place beside the module's adapter")
            found[f"{own}.{last}"] = ref
        return found

    @cached_property
    def _token_rows(self) -> dict[str, TensorRef]:
        """Embedding or head -> rows of some of its tokens. Raises where these are not the tokens that the config names."""
        found = {name.removesuffix(_ROWS): ref for name, ref in self._by_name.items() if name.endswith(_ROWS)}
        width = self.base.tensors[self._ends[0]].shape[1:]
        for module, ref in found.items():
            ids = self.settings.trained_tokens(self._embedding if self._is_tied else module)
            if module not in (self._embedding, self._family.head) or self._family.shares:
                raise self._unknown(ref, module)
            if self.settings.trained_tokens(module) not in ([], ids):
                raise self._tied(ref)
            if ref.shape != (len(ids), *width) or len(set(ids)) < len(ids):
                raise self._unexplained(ref, f"shape {list(ref.shape)}, and {len(ids)} tokens in trainable_token_indices")
        return found

    # --- what it does

    def replaced(self) -> dict[str, TensorRef]:
        """Name of a tensor of the base -> the tensor of the file that takes its place."""
        found, (embedding, head) = dict(self._whole), self._ends
        if self._is_tied and head in found:  # one parameter with the embedding, saved under both names
            found.setdefault(embedding, found[head])
            del found[head]
        # Of what has a row for each token the adapter may have more or fewer than the base.
        of_tokens = () if self._family.shares else (embedding, head, f"{self._family.head}.bias")
        for name, ref in found.items():
            expected = self.base.tensors[name].shape
            if ref.shape != expected and not (name in of_tokens and ref.shape[1:] == expected[1:]):
                raise self._other_shape(ref, expected)
        for module, rows in self._token_rows.items():
            name = weight_of(module)
            if rows.shape[0] and not (self._is_tied and module == self._family.head):
                found[name] = self._with_token_rows(module, found.get(name, self.base.tensors[name]), rows)
        return found

    def _with_token_rows(self, module: str, own: TensorRef, rows: TensorRef) -> TensorRef:
        """A tensor with the file's rows of some tokens in place of its own."""
        ids = self.settings.trained_tokens(module)
        if max(ids) >= own.shape[0]:
            raise MismatchError(
                "the adapter has a token that its embedding has no row for",
                where=f"{self.where}: {rows.name}",
                found=f"token {max(ids)}",
                expected=f"below {own.shape[0]}, the rows of {own.name}",
                remedy="save the adapter with save_embedding_layers=True, or use the base model that it was trained on",
            )
        return with_rows(own, {token: ((rows, place),) for place, token in sorted(enumerate(ids), key=lambda each: each[1])})

    def changes(self) -> dict[str, Change]:
        """Name of a weight of the base -> its change."""
        found: dict[str, Change] = {}
        for module, parts in self._parts.items():
            names = [weight_of(member) for member in self._members(module)]
            shapes = [self._whole.get(name, self.base.tensors[name]).shape for name in names]
            is_embedding = self._family.looks_up(module)
            if any(len(shape) != 2 for shape in shapes) or ("ia3_l" in parts and is_embedding):
                raise UnsupportedError(
                    "the adapter is on a module that is no linear layer" + ("" if "ia3_l" in parts else " or embedding"),
                    where=f"{self.where}: {names[0]}",
                    found=f"shape {list(shapes[0])}",
                    expected="a 2-D weight",
                    remedy="train the adapter on linear layers",
                )
            total, start = sum(shape[0] for shape in shapes), 0
            turned = is_embedding or self._family.keeps_columns(module)
            sizes = (shapes[0][1], total) if turned else (total, shapes[0][1])
            for name, shape in zip(names, shapes, strict=True):
                rows = None if len(names) == 1 else (start, start + shape[0])
                found[name] = self._change(module, parts, sizes, rows, turned)
                start += shape[0]
        return found

    def _change(
        self, module: str, parts: Mapping[str, TensorRef], sizes: tuple[int, int], rows: tuple[int, int] | None, turned: bool
    ) -> Change:
        """The change of a module with `sizes` outputs and inputs, whose weight is kept `turned`, one row per input, or not."""
        settings, (outputs, inputs) = self.settings, sizes
        if isinstance(settings, IA3Settings):
            scales_inputs = settings.scales_inputs(module)
            self._check(module, parts, {"ia3_l": (1, inputs) if scales_inputs else (outputs, 1)})
            by_row = scales_inputs == turned
            return Scaling(parts["ia3_l"], "rows", rows) if by_row else Scaling(parts["ia3_l"], "columns")
        assert isinstance(settings, LoraSettings)
        is_embedding = self._family.looks_up(module)
        a, b = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
        rank = parts[a].shape[0] if a in parts and parts[a].shape else 0
        expected: dict[str, tuple[int, ...]] = {a: (rank, inputs), b: (outputs, rank)}
        expected |= {"lora_magnitude_vector": (outputs,)} if settings.use_dora else {}
        expected |= {"lora_B.bias": (outputs,)} if settings.lora_bias else {}
        self._check(module, parts, expected)
        lacking = [each for each in self._members(module) if settings.lora_bias and f"{each}.bias" not in self.base.tensors]
        if lacking:  # PEFT's merge has no place for it either
            raise UnsupportedError(
                "the adapter adds a bias (lora_bias) to a layer that has none",
                where=f"{self.where}: {lacking[0]}",
                remedy="train the adapter without lora_bias",
            )
        magnitude, bias = parts.get("lora_magnitude_vector"), parts.get("lora_B.bias")
        return LowRank(parts[a], parts[b], settings.scale(module, max(rank, 1)), rows, magnitude, bias, transposed=turned)

    def bias_changes(self, changes: Mapping[str, Change]) -> dict[str, Change]:
        """Name of a bias of the base -> the change of its module, when that reaches the bias."""
        found = {}
        for name, change in changes.items():
            bias = f"{module_of(name)}.bias"
            reaches = change.bias is not None if isinstance(change, LowRank) else change.of_outputs
            if reaches and bias in self.base.tensors:
                found[bias] = change
        return found

    def notes(self) -> Iterator[str]:
        """Remarks for the user."""
        own = [name for name in self._whole if module_of(name) in self._parts and name.endswith(".weight")]
        if own:
            yield f"the adapter brings its own copy of {shortened(', '.join(own))}, which replaces the base's before the change"

    # --- errors

    def _check(self, module: str, parts: Mapping[str, TensorRef], expected: Mapping[str, tuple[int, ...]]) -> None:
        """Raise unless the module has exactly the tensors that the config asks for, of these shapes."""
        missing = sorted(expected.keys() - parts.keys())
        if missing:
            where, there = f"{self.where}: {module}", ", ".join(sorted(parts))
            raise damaged("the adapter lacks a part of a module", where, there, f"{', '.join(missing)} as well")
        for part in sorted(parts.keys() - expected.keys()):
            raise self._unexplained(parts[part], "the config does not ask for it")
        for part, shape in expected.items():
            if parts[part].shape != shape:
                raise self._other_shape(parts[part], shape)

    def _tied(self, ref: TensorRef) -> UnsupportedError:
        """PEFT computes both apart until it merges; then one change lands in both, so that no tied model is the adapter's."""
        return UnsupportedError(
            "the adapter changes the embedding or the head, which are one tensor in this base model",
            where=f"{self.where}: {ref.name}",
            found="tied embeddings in the base model",
            remedy=f"train the adapter without embeddings and lm_head, or {UNTIE}",
        )

    def _shared(self, ref: TensorRef) -> UnsupportedError:
        return UnsupportedError(
            "the adapter changes an embedding that nothing of the model reads",
            where=f"{self.where}: {ref.name}",
            found=f"{self._embedding}: encoder and decoder read embeddings of their own, so that PEFT's model is the base",
            remedy="train the adapter without the embedding",
        )

    def _unknown(self, ref: TensorRef, module: str) -> MismatchError:
        where = f"{self.where}: {ref.name}"
        layers, (layer, _) = layers_of(self._base_names), split_layer(module)
        if layer is not None and layer not in layers:
            return other_base(
                "the adapter has more layers than the base model", where, f"layer {layer}", f"{len(layers)} layers"
            )
        expected = f"a module of {self.base.spec} ({self.base.config.get('model_type')})"
        return other_base("the adapter has a tensor for a part that the base model lacks", where, module, expected)

    def _unexplained(self, ref: TensorRef, why: str) -> SourceError:
        expected = f"only tensors that {CONFIG_FILE} explains"
        return damaged("a tensor of the adapter would be lost", f"{self.where}: {ref.name}", why, expected)

    def _other_shape(self, ref: TensorRef, expected: tuple[int, ...]) -> MismatchError:
        what, wanted = "the adapter does not fit the base model's sizes", f"{list(expected)}, for {self.base.spec}"
        return other_base(what, f"{self.where}: {ref.name}", list(ref.shape), wanted)
