"""adapter_config.json of a PEFT adapter: checked settings, and PEFT's own rules for which modules they mean.

The rules are PEFT's, read in its source (0.21.2): which modules are targets (`check_target_module_exists`), and their rank
and alpha (`get_pattern_key`). A setting whose effect on the weights is not known here is refused, never ignored.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from modekit.errors import MismatchError, SourceError, UnsupportedError
from modekit.files.read import UNREADABLE, read_json
from modekit.files.typed import shortened
from modekit.sources.family import Config
from modekit.sources.names import EMBEDDING, HEAD, is_looked_up
from modekit.sources.patterns import ModulePatterns
from modekit.sources.wrappers import PLAIN, Naming

CONFIG_FILE = "adapter_config.json"
SAVE_AGAIN = "download or save the adapter again"

MERGE_FIRST = "merge it into its base with PEFT (merge_and_unload, then save_pretrained) and give the full model"
_GIVE_SAVED = "give an adapter that PEFT saved (save_pretrained)"
_LARGEST = 2**20  # bytes of a config: ten times what one with a rank for every module of a large model has
_Value = TypeVar("_Value")
_Kind = TypeVar("_Kind", bound=BaseModel)
_Names = Annotated[list[str], Field(max_length=10_000)]
_Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=2**20)]
_Rank = Annotated[int, Field(ge=1, le=10**100)]
_Alpha = Annotated[float, Field(gt=-1e30, lt=1e30, allow_inf_nan=False)]

NO_EFFECT = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("lora_dropout", "runtime_config", "megatron_core", "qalora_group_size", "init_ia3_weights"),
    # read only while the matching init_lora_weights initialises; those that change the base are refused there
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
}
"""Settings that say nothing about what the saved weights do."""
_INITS_OF_THE_ADAPTER = frozenset({"true", "false", "none", "gaussian", "eva", "orthogonal", "mica"})
"""Initialisations that leave the base's weights alone; the others (pissa, olora, corda, loftq, lora_ga) change them."""


class AdapterSettings(BaseModel):
    """What LoRA and IA3 share, with PEFT's defaults. Methods name modules as the base model does."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    target_modules: str | _Names
    exclude_modules: str | _Names | None = None
    modules_to_save: _Names | None = None
    fan_in_fan_out: bool = False
    _patterns: ModulePatterns = PrivateAttr(default_factory=ModulePatterns)
    _naming: Naming = PrivateAttr(default=PLAIN)

    @property
    def takes_all_linear(self) -> bool:
        """Whether every linear layer but the head is a target, by PEFT's shorthand."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear"

    @property
    def ties_copies(self) -> bool:
        """Whether copies of a tied embedding and head (modules_to_save) are one tensor."""
        return False

    def targets(self, module: str) -> bool:
        """Whether PEFT puts an adapter on a module (`check_target_module_exists`)."""
        named = self._naming.named(module)
        if self._excludes(named):
            return False
        if self.takes_all_linear:
            return module != HEAD and not is_looked_up(module)
        if isinstance(self.target_modules, str):
            return self._patterns.fullmatch(self.target_modules, named)
        return named in self.target_modules or (_ends_with(named, self.target_modules) and self._is_in_layers(named))

    def saves(self, module: str) -> bool:
        """Whether PEFT keeps a whole copy of a module: by the end of its name, or of that of a module around it."""
        parts = self._naming.named(module).split(".")
        around = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
        return any(name.endswith(tuple(self.modules_to_save or ())) for name in around)

    def _excludes(self, module: str) -> bool:
        excluded = self.exclude_modules or []
        if isinstance(excluded, str):
            is_excluded = self._patterns.fullmatch(excluded, module)
        else:
            is_excluded = module in excluded or _ends_with(module, excluded)
        return is_excluded or any(
            self._patterns.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.modules_to_save or []
        )

    def _is_in_layers(self, module: str) -> bool:
        return True


class LoraSettings(AdapterSettings):
    """Settings of LoRA, rsLoRA and DoRA."""

    r: _Rank = 8
    lora_alpha: _Alpha = 8.0
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    rank_pattern: Annotated[dict[str, _Rank], Field(max_length=10_000)] | None = None
    alpha_pattern: Annotated[dict[str, _Alpha], Field(max_length=10_000)] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | _Names | None = None
    init_lora_weights: bool | str | None = True
    ensure_weight_tying: bool = False
    trainable_token_indices: _Ids | dict[str, _Ids] | None = None

    @property
    def ties_copies(self) -> bool:
        """Whether copies of a tied embedding and head (modules_to_save) are one tensor."""
        return self.ensure_weight_tying

    def rank(self, module: str) -> int:
        """R of a module."""
        return self._by_pattern(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """The factor of B A."""
        rank, alpha = self.rank(module), self._by_pattern(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def trained_tokens(self, module: str) -> list[int]:
        """Ids of the tokens of which the adapter has rows of its own in an embedding or head."""
        said = self.trainable_token_indices or {}
        named = said if isinstance(said, dict) else {EMBEDDING.rpartition(".")[2]: said}
        return next((ids for name, ids in named.items() if module.endswith(name)), [])

    def unused_patterns(self, modules: Iterable[str]) -> list[str]:
        """Entries of rank_pattern and alpha_pattern that match none of the adapted modules."""
        patterns = {**(self.rank_pattern or {}), **(self.alpha_pattern or {})}
        named = [self._naming.named(module) for module in modules]
        return [pattern for pattern in patterns if not any(self._patterns.ends(pattern, module) for module in named)]

    def _by_pattern(self, patterns: Mapping[str, _Value] | None, module: str, default: _Value) -> _Value:
        """The value of the first pattern that matches the module's name or its end."""
        module = self._naming.named(module)
        return next((value for pattern, value in (patterns or {}).items() if self._patterns.ends(pattern, module)), default)

    def _is_in_layers(self, module: str) -> bool:
        """Whether layers_to_transform holds for a module; PEFT asks only for targets that are not named in full."""
        wanted = [self.layers_to_transform] if isinstance(self.layers_to_transform, int) else self.layers_to_transform
        if not wanted:
            return True
        names = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        patterns = [rf"(?:^|.*?\.){name}" for name in names or [] if name] or [r".*?\.[^.]*"]
        matches = (self._patterns.match(rf"{pattern}\.(?P<layer>\d+)\.", module) for pattern in patterns)
        first = next((match for match in matches if match is not None), None)
        return first is not None and len(first["layer"]) < 10 and int(first["layer"]) in wanted


class IA3Settings(AdapterSettings):
    """Settings of IA3."""

    feedforward_modules: str | _Names

    def scales_inputs(self, module: str) -> bool:
        """Whether a target is a feedforward module, whose input is scaled (PEFT asks for no dot before the name here)."""
        module = self._naming.named(module)
        if isinstance(self.feedforward_modules, str):
            return self._patterns.fullmatch(self.feedforward_modules, module)
        return module.endswith(tuple(self.feedforward_modules))


_KINDS: dict[str, type[AdapterSettings]] = {"LORA": LoraSettings, "IA3": IA3Settings}
PREFIX_KINDS = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")
"""Adapters that stand before the text (prefix.py)."""


def damaged(what: str, where: str, found: object = None, expected: object = None) -> SourceError:
    """The error of an adapter that contradicts itself."""
    return SourceError(what, where=where, found=found, expected=expected, remedy=SAVE_AGAIN)


def other_base(what: str, where: str, found: object, expected: object) -> MismatchError:
    """The error of an adapter that is not for this base model."""
    remedy = "use an adapter that was trained on this base model"
    return MismatchError(what, where=where, found=found, expected=expected, remedy=remedy)


def _ends_with(module: str, names: Iterable[str]) -> bool:
    return any(module.endswith(f".{name}") for name in names)


def read_adapter_config(folder: Path, *, where: str) -> dict[str, object]:
    """An adapter's config as data. Raises SourceError when it is missing, not JSON, or names no peft_type."""
    try:
        config = read_json(folder / CONFIG_FILE, _LARGEST)
    except FileNotFoundError:
        if (folder / "config.json").exists():
            remedy = "name it as model: in place of adapter: in the recipe"
            raise SourceError("this is a full model, not an adapter", where=where, remedy=remedy) from None
        raise SourceError(f"{CONFIG_FILE} is missing", where=where, remedy=_GIVE_SAVED) from None
    except UNREADABLE as error:
        raise damaged(f"{CONFIG_FILE} cannot be read", where, error) from None
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        kinds = " or ".join(_KINDS)
        raise SourceError(f"{CONFIG_FILE} names no peft_type", where=where, expected=kinds, remedy=_GIVE_SAVED)
    return config


def parse_settings(config: Config, *, where: str, naming: Naming = PLAIN) -> AdapterSettings:
    """The settings that shape the weights; `naming` is that of the model on which the adapter was trained.

    Raises SourceError for values of the wrong kind, UnsupportedError for kinds and settings whose maths is not known here.
    """
    kind = _KINDS.get(str(config["peft_type"]))
    if kind is None:
        raise UnsupportedError(
            "an adapter of this kind cannot be read",
            where=f"{where}: {CONFIG_FILE}",
            found=f"peft_type {shortened(config['peft_type'])}",
            expected=f"{' or '.join(_KINDS)}; {', '.join(PREFIX_KINDS)}",
            remedy=MERGE_FIRST,
        )
    settings = checked_settings(kind, config, "the weights", where=where, remedy=MERGE_FIRST)
    settings._patterns.where, settings._naming = f"{where}: {CONFIG_FILE}", naming
    if isinstance(settings, LoraSettings):
        _check_lora(settings, where=f"{where}: {CONFIG_FILE}")
    return settings


def checked_settings(
    kind: type[_Kind], config: Config, what: str, *, where: str, remedy: str, without_effect: Collection[str] = ()
) -> _Kind:
    """The settings of a config. Raises UnsupportedError where nobody knows what one of them does to `what`, and SourceError."""
    where = f"{where}: {CONFIG_FILE}"
    known = {*kind.model_fields, *NO_EFFECT, *without_effect}
    for key, value in config.items():
        if key not in known and value not in (None, False, [], {}, ""):
            said = f"modekit does not know what this setting does to {what}"
            raise UnsupportedError(said, where=where, found=f"{key}: {shortened(value)}", remedy=remedy)
    try:
        return kind.model_validate(dict(config))
    except ValidationError as error:
        key, problem = str(error.errors()[0]["loc"][0]), error.errors()[0]["msg"]
        raise damaged(f"{key} has no usable value", where, shortened(config.get(key, "nothing")), problem) from None


def _check_lora(settings: LoraSettings, *, where: str) -> None:
    if str(settings.init_lora_weights).lower() not in _INITS_OF_THE_ADAPTER:
        raise UnsupportedError(
            "this initialisation may have changed the base model's weights, which the adapter does not hold",
            where=where,
            found=f"init_lora_weights: {shortened(settings.init_lora_weights)}",
            remedy="save it as plain LoRA (save_pretrained with path_initial_model_for_weight_conversion), or " + MERGE_FIRST,
        )
    if settings.use_dora and settings.lora_bias:
        raise damaged("use_dora and lora_bias exclude each other in PEFT", where, "both true")
    if isinstance(settings.target_modules, str) and settings.layers_to_transform is not None:
        raise SourceError(
            "layers_to_transform needs target_modules as a list, as in PEFT",
            where=where,
            found=f"target_modules: {shortened(settings.target_modules)}",
            remedy="name the layers in the pattern of target_modules",
        )
