"""Which module of the base every tensor of an adapter file belongs to, by PEFT's names.

Tensors are named as PEFT names them when it saves (`get_peft_model_state_dict`); what it would not load, or not load into
the same place, is refused, never ignored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from modekit.errors import MismatchError, UnsupportedError, some_of
from modekit.files.typed import shortened
from modekit.sources.adapter_config import CONFIG_FILE, AdapterSettings, IA3Settings, LoraSettings, damaged, other_base
from modekit.sources.families import family_of
from modekit.sources.family import UNTIE, Family
from modekit.sources.model import ModelSource, TensorRef, check_floats
from modekit.sources.names import embedding_in, layers_of, module_of, split_layer, weight_of
from modekit.sources.rows import with_rows
from modekit.sources.wrappers import PLAIN, Naming

_PREFIX = "base_model.model."
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector|ia3_l)"
)
_TOKENS = ".token_adapter"
"""Behind the name of a module of which the file has rows of some tokens (trainable_token_indices)."""
_ROWS = f"{_TOKENS}.trainable_tokens_delta"
_FUSED: dict[str, tuple[str, ...]] = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Fused projection -> the projections whose rows it stacks, in order (Phi3's layout)."""


def peft_plain(key: str) -> str:
    """A tensor's name without what PEFT puts before all names."""
    return key.removeprefix(_PREFIX)


@dataclass(frozen=True)
class Resolution:
    """What the tensors of one adapter file mean for one base model; `naming` is that of the model it was trained on.

    Raises SourceError, MismatchError or UnsupportedError when made, or when asked, for what no base weight can say.
    """

    where: str
    settings: AdapterSettings
    base: ModelSource
    tensors: Mapping[str, TensorRef]
    naming: Naming = PLAIN

    def __post_init__(self) -> None:
        check_floats(self.tensors.values(), where=self.where)
        self._check_targets_are_there()

    @cached_property
    def is_ia3(self) -> bool:
        """Whether the adapter scales (IA3) and does not add (LoRA)."""
        return isinstance(self.settings, IA3Settings)

    @cached_property
    def family(self) -> Family:
        """The base's."""
        return family_of(self.base.config, where=self.base.where)

    @cached_property
    def _is_tied(self) -> bool:
        if self.family.derived is not None:
            return bool(self.family.ties)
        said = self.base.config.get("tie_word_embeddings", self.family.defaults.get("tie_word_embeddings"))
        return bool(said and not self.family.shares) or weight_of(self.family.head) not in self.base.tensors

    @cached_property
    def _embedding(self) -> str:
        return self.family.embedding if self.family.derived is not None else embedding_in(self.base.tensors)

    @cached_property
    def _base_names(self) -> frozenset[str]:
        """Names of tensors that the adapter may change; the head of a tied base is not one of its own."""
        return frozenset(name for name in self.base.tensors if not (self._is_tied and name == weight_of(self.family.head)))

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

    def members(self, module: str) -> tuple[str, ...]:
        """Modules of the base that an adapted module stands for: itself, or what a fused one stacks."""
        return self._fused_modules.get(module, (module,))

    @cached_property
    def _by_name(self) -> dict[str, TensorRef]:
        """Tensors of the file under their name in the base model, with what PEFT appends."""
        found: dict[str, TensorRef] = {}
        for key, ref in self.tensors.items():
            name = self._name_in_base(key)
            if name is None:
                continue
            if name in found:
                both = f"{found[name].name} and {key}"
                raise damaged("two tensors of the adapter mean the same", f"{self.where}: {name}", both)
            found[name] = ref
        return found

    def _name_in_base(self, key: str) -> str | None:
        name = peft_plain(key)
        return name if self.naming is PLAIN else self.naming.plain(name)

    @cached_property
    def beside(self) -> dict[str, TensorRef]:
        """Tensors of an adapter of a wrapper that are for no part of the language model, such as those of a vision tower."""
        return {peft_plain(key): ref for key, ref in self.tensors.items() if self._name_in_base(key) is None}

    @cached_property
    def parts(self) -> dict[str, dict[str, TensorRef]]:
        """Adapted module -> its adapter tensors by part."""
        found: dict[str, dict[str, TensorRef]] = {}
        for name, ref in self._by_name.items():
            match = _PART.fullmatch(name)
            if match is None:
                continue
            module = match["module"]
            if self._is_tied and module in {self._embedding, self.family.head}:
                self._refuse_tied(ref)
            if self.family.shares and module == self._embedding:
                self._refuse_shared(ref)
            if module not in self._base_modules and module not in self._fused_modules:
                self._refuse_unknown(ref, module)
            if not self.settings.targets(module):
                self.refuse_unexplained(ref, "its module is no target by target_modules and exclude_modules")
            found.setdefault(module, {})[match["part"]] = ref
        return found

    @cached_property
    def whole(self) -> dict[str, TensorRef]:
        """Whole tensors of the file by their name in the base: biases, modules_to_save, saved embeddings."""
        found: dict[str, TensorRef] = {}
        for name, ref in self._by_name.items():
            if _PART.fullmatch(name) or self._is_inside_wrapper(name) or name.endswith(_ROWS):
                continue
            module, _, last = name.rpartition(".")
            own = module.removesuffix(".base_layer").removesuffix(_TOKENS)  # the adapted module itself lies under base_layer
            is_tied = self._is_tied and f"{own}.{last}" in {weight_of(self._embedding), weight_of(self.family.head)}
            if is_tied and self.settings.saves(own) and not self.settings.ties_copies:
                self._refuse_tied(ref)
            if self.family.shares and not is_tied and own == self._embedding and self.settings.saves(own):
                self._refuse_shared(ref)
            if not is_tied and f"{own}.{last}" not in self._base_names:
                self._refuse_unknown(ref, own)
            if (own in self.parts or own in self.token_rows) != (own != module):
                self.refuse_unexplained(ref, "PEFT gives it no place beside the module's adapter")
            found[f"{own}.{last}"] = ref
        return found

    @cached_property
    def token_rows(self) -> dict[str, TensorRef]:
        """Embedding or head -> rows of some of its tokens. Raises where these are not the tokens that the config names."""
        found = {name.removesuffix(_ROWS): ref for name, ref in self._by_name.items() if name.endswith(_ROWS)}
        for module, ref in found.items():
            ids = self._trained_tokens(self._embedding if self._is_tied else module)
            if module not in (self._embedding, self.family.head) or self.family.shares:
                self._refuse_unknown(ref, module)
            if self._trained_tokens(module) not in ([], ids):
                self._refuse_tied(ref)
            if ref.shape != (len(ids), *self.base.tensors[weight_of(self._embedding)].shape[1:]) or len(set(ids)) < len(ids):
                self.refuse_unexplained(ref, f"{ref.shape[0] if ref.shape else 0} rows, and other tokens in the config")
        lacking = [each for each in (self._embedding, self.family.head) if self._trained_tokens(each) and each not in found]
        if lacking and not (self._is_tied and self._embedding in found):
            raise damaged("the adapter file lacks the rows of trainable_token_indices", f"{self.where}: {lacking[0]}")
        return found

    def _trained_tokens(self, module: str) -> list[int]:
        return self.settings.trained_tokens(module) if isinstance(self.settings, LoraSettings) else []

    def _with_token_rows(self, name: str, own: TensorRef, rows: TensorRef) -> TensorRef:
        """A tensor with the file's rows of some tokens in place of its own."""
        ids = self._trained_tokens(module_of(name))
        if max(ids) >= own.shape[0]:
            raise MismatchError(
                "the adapter has a token that its embedding has no row for",
                where=f"{self.where}: {rows.name}",
                found=f"token {max(ids)}",
                expected=f"below {own.shape[0]}, the rows of {own.name}",
                remedy="save the adapter with save_embedding_layers=True, or use the base model that it was trained on",
            )
        return with_rows(own, {token: ((rows, place),) for place, token in sorted(enumerate(ids), key=lambda each: each[1])})

    def _is_inside_wrapper(self, name: str) -> bool:
        """With bias: all, PEFT saves biases of modules_to_save three times; two of the names are never read again."""
        module, _, last = name.rpartition(".")
        for inside in (".original_module", ".modules_to_save"):
            own = module.removesuffix(inside)
            saves = self.settings.saves(own) or (own == self.family.head and self._is_tied and self.settings.ties_copies)
            if own != module and saves and f"{own}.{last}" in self._by_name:
                return True
        return False

    def replaced(self) -> dict[str, TensorRef]:
        """Name of a tensor of the base -> the tensor of the file that takes its place."""
        names = self._base_names | {weight_of(self.family.head)}  # PEFT copies the head of a tied base, too
        missing = sorted(name for name in names if self.settings.saves(module_of(name)) and name not in self.whole)
        if missing:
            copies = f"whole copies of modules_to_save: {shortened(self.settings.modules_to_save)}"
            raise damaged("the adapter file lacks tensors of modules_to_save", self.where, some_of(missing), copies)
        found = dict(self.whole)
        if self._is_tied and weight_of(self.family.head) in found:
            head = found.pop(weight_of(self.family.head))  # one parameter with the embedding, saved under both names
            found.setdefault(weight_of(self._embedding), head)
        # Of what has a row for each token the adapter may have more or fewer than the base.
        both = (weight_of(self._embedding), weight_of(self.family.head))
        of_tokens = () if self.family.shares else (*both, f"{self.family.head}.bias")
        for name, ref in found.items():
            expected = self.base.tensors[name].shape
            if ref.shape != expected and not (name in of_tokens and ref.shape[1:] == expected[1:]):
                self.refuse_shape(ref, expected)
        for module, rows in self.token_rows.items():
            name = weight_of(module)
            if rows.shape[0] and not (self._is_tied and module == self.family.head):
                found[name] = self._with_token_rows(name, found.get(name, self.base.tensors[name]), rows)
        return found

    def weights(self, module: str) -> dict[str, TensorRef]:
        """The base's weights, (O, I) each, that an adapted module stands for."""
        members = self.members(module)
        weights = {f"{member}.weight": self.base.tensors[f"{member}.weight"] for member in members}
        for name, ref in weights.items():
            if len(ref.shape) != 2 or (self.is_ia3 and self.family.looks_up(module)):
                raise UnsupportedError(
                    "the adapter is on a module that is no linear layer" + ("" if self.is_ia3 else " or embedding"),
                    where=f"{self.where}: {name}",
                    found=f"shape {list(ref.shape)}",
                    expected="a 2-D weight",
                    remedy="train the adapter on linear layers",
                )
        if members != (module,):
            twice = [member for member in members if member in self.parts]
            if twice:
                both = f"{module} and {some_of(twice)}"
                raise damaged("the adapter has both a fused module and its parts", self.where, both)
        return weights

    def _check_targets_are_there(self) -> None:
        """Raise SourceError when the config targets a module that the file does not adapt."""
        fused = {member for module in self.parts for member in self._fused_modules.get(module, ())}
        modules = self._base_modules | ({self.family.head} - {""})
        if self.settings.takes_all_linear:
            modules = frozenset(
                module for module in modules - {self.family.head} if len(self.base.tensors[weight_of(module)].shape) == 2
            )
        missing = {module for module in modules - self.parts.keys() - fused if self.settings.targets(module)}
        # A fused target that the base lacks means nothing to PEFT, unless the file shows that the adapter is for fused modules.
        kinds = {module.rpartition(".")[2] for module in self.parts if module in self._fused_modules}
        fused_modules = {module for module in self._fused_modules if module.rpartition(".")[2] in kinds}
        missing |= {module for module in fused_modules - self.parts.keys() if self.settings.targets(module)}
        if missing:
            what, expected = "the adapter file lacks modules that its config targets", shortened(self.settings.target_modules)
            raise damaged(what, self.where, some_of(sorted(missing)), f"target_modules: {expected}")

    def _refuse_tied(self, ref: TensorRef) -> None:
        """PEFT computes both apart until it merges; then one change lands in both, so that no tied model is the adapter's."""
        raise UnsupportedError(
            "the adapter changes the embedding or the head, which are one tensor in this base model",
            where=f"{self.where}: {ref.name}",
            found="tied embeddings in the base model",
            remedy=f"train the adapter without embeddings and lm_head, or {UNTIE}",
        )

    def _refuse_shared(self, ref: TensorRef) -> None:
        raise UnsupportedError(
            "the adapter changes an embedding that nothing of the model reads",
            where=f"{self.where}: {ref.name}",
            found=f"{self._embedding}: encoder and decoder read embeddings of their own, so that PEFT's model is the base",
            remedy="train the adapter without the embedding",
        )

    def _refuse_unknown(self, ref: TensorRef, module: str) -> None:
        where = f"{self.where}: {ref.name}"
        layers, (layer, _) = layers_of(self._base_names), split_layer(module)
        if layer is not None and layer not in layers:
            what = "the adapter has more layers than the base model"
            raise other_base(what, where, f"layer {layer}", f"{len(layers)} layers")
        expected = f"a module of {self.base.spec} ({self.base.config.get('model_type')})"
        raise other_base("the adapter has a tensor for a part that the base model lacks", where, module, expected)

    def refuse_unexplained(self, ref: TensorRef, why: str) -> None:
        """Raise SourceError for a tensor that the config gives no meaning."""
        expected = f"only tensors that {CONFIG_FILE} explains"
        raise damaged("a tensor of the adapter would be lost", f"{self.where}: {ref.name}", why, expected)

    def refuse_shape(self, ref: TensorRef, expected: tuple[int, ...]) -> None:
        """Raise MismatchError for a tensor of another shape."""
        what, wanted = "the adapter does not fit the base model's sizes", f"{list(expected)}, for {self.base.spec}"
        raise other_base(what, f"{self.where}: {ref.name}", list(ref.shape), wanted)
