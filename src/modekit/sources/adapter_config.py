"""adapter_config.json of a PEFT adapter: the settings that say what its tensors do.

Which modules an adapter changes, and with which rank, its file says. A setting whose effect on the weights is not known here is
refused, never ignored.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from modekit.errors import MismatchError, SourceError, UnsupportedError
from modekit.files.read import UNREADABLE, read_json
from modekit.files.typed import shortened
from modekit.sources.config import Config
from modekit.sources.names import EMBEDDING
from modekit.sources.towers import PLAIN, Naming

CONFIG_FILE = "adapter_config.json"
MERGE_FIRST = "merge it into its base with PEFT (merge_and_unload, then save_pretrained) and give the full model"
_GIVE_SAVED = "give an adapter that PEFT saved (save_pretrained)"
_LARGEST = 2**20  # bytes of a config: ten times what one with a rank for every module of a large model has
_Kind = TypeVar("_Kind", bound=BaseModel)
_Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=2**20)]
_Alpha = Annotated[float, Field(gt=-1e30, lt=1e30, allow_inf_nan=False)]
_Pattern = Annotated[str, Field(max_length=1000)]

NO_EFFECT = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("lora_dropout", "runtime_config", "megatron_core", "qalora_group_size", "init_ia3_weights"),
    # which modules, layers and ranks there are, the file says
    *(
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "r",
        "rank_pattern",
        "bias",
        "fan_in_fan_out",
    ),
    # read only while the matching init_lora_weights initialises; those that change the base are refused there
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
}
"""Settings that say nothing about what the saved tensors do."""
_INITS_OF_THE_ADAPTER = frozenset({"true", "false", "none", "gaussian", "eva", "orthogonal", "mica"})
"""Initialisations that leave the base's weights alone; the others (pissa, olora, corda, loftq, lora_ga) change them."""


class AdapterSettings(BaseModel):
    """What LoRA and IA3 share, with PEFT's defaults. Methods name modules as the base model does."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    modules_to_save: Annotated[list[str], Field(max_length=10_000)] | None = None
    _naming: Naming = PrivateAttr(default=PLAIN)
    _where: str = PrivateAttr(default="")

    def saves(self, module: str) -> bool:
        """Whether PEFT keeps a whole copy of a module: by the end of its name, or of that of a module around it."""
        parts = self._naming.named(module).split(".")
        around = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
        return any(name.endswith(tuple(self.modules_to_save or ())) for name in around)

    def trained_tokens(self, module: str) -> list[int]:
        """Ids of the tokens of which the adapter has rows of its own in an embedding or head."""
        return []

    def matches(self, pattern: str, module: str) -> bool:
        """Whether a regular expression is all of a module's name. Raises SourceError for what is none, or takes too long."""
        import regex  # which stops when it is told to, as `re` does not

        try:
            return regex.fullmatch(pattern, self._naming.named(module), timeout=1.0) is not None
        except (regex.error, TimeoutError, MemoryError, OverflowError, RecursionError) as error:
            raise SourceError(
                "a pattern in adapter_config.json is no regular expression, or takes too long to match",
                where=self._where,
                found=f"{pattern[:200]}: {error}",
                remedy="name the modules in full in place of a pattern, or save the adapter again",
            ) from None


class LoraSettings(AdapterSettings):
    """Settings of LoRA, rsLoRA and DoRA."""

    lora_alpha: _Alpha = 8.0
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    alpha_pattern: Annotated[dict[_Pattern, _Alpha], Field(max_length=10_000)] | None = None
    init_lora_weights: bool | str | None = True
    ensure_weight_tying: bool = False
    trainable_token_indices: _Ids | dict[str, _Ids] | None = None

    def scale(self, module: str, rank: int) -> float:
        """The factor of B A. The first pattern counts that is a module's name or its end (PEFT's `get_pattern_key`)."""
        patterns = (self.alpha_pattern or {}).items()
        alpha = next((each for key, each in patterns if self.matches(rf"(.*\.)?({key})", module)), self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def trained_tokens(self, module: str) -> list[int]:
        """Ids of the tokens of which the adapter has rows of its own in an embedding or head."""
        said = self.trainable_token_indices or {}
        named = said if isinstance(said, dict) else {EMBEDDING.rpartition(".")[2]: said}
        return next((ids for name, ids in named.items() if module.endswith(name)), [])


class IA3Settings(AdapterSettings):
    """Settings of IA3."""

    feedforward_modules: _Pattern | Annotated[list[str], Field(max_length=10_000)]

    def scales_inputs(self, module: str) -> bool:
        """Whether a target is a feedforward module, whose input is scaled (PEFT asks for no dot before the name here)."""
        if isinstance(self.feedforward_modules, str):
            return self.matches(self.feedforward_modules, module)
        return self._naming.named(module).endswith(tuple(self.feedforward_modules))


def damaged(what: str, where: str, found: object = None, expected: object = None) -> SourceError:
    """The error of an adapter that contradicts itself."""
    return SourceError(what, where=where, found=found, expected=expected, remedy="download or save the adapter again")


def other_base(what: str, where: str, found: object, expected: object) -> MismatchError:
    """The error of an adapter that is not for this base model."""
    remedy = "use an adapter that was trained on this base model"
    return MismatchError(what, where=where, found=found, expected=expected, remedy=remedy)


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
        raise SourceError(f"{CONFIG_FILE} names no peft_type", where=where, expected="LORA or IA3", remedy=_GIVE_SAVED)
    return config


def parse_settings(config: Config, *, where: str, naming: Naming = PLAIN) -> AdapterSettings:
    """The settings that shape the weights; `naming` is that of the model on which the adapter was trained.

    Raises SourceError for values of the wrong kind, UnsupportedError for kinds and settings whose maths is not known here.
    """
    kinds: dict[object, type[AdapterSettings]] = {"LORA": LoraSettings, "IA3": IA3Settings}
    kind = kinds.get(config["peft_type"])
    if kind is None:
        raise UnsupportedError(
            "an adapter of this kind cannot be read",
            where=f"{where}: {CONFIG_FILE}",
            found=f"peft_type {shortened(config['peft_type'])}",
            expected=f"{' or '.join(map(str, kinds))}",
            remedy=MERGE_FIRST,
        )
    settings = checked_settings(kind, config, "the weights", where=where, remedy=MERGE_FIRST)
    settings._where, settings._naming = f"{where}: {CONFIG_FILE}", naming
    if isinstance(settings, LoraSettings) and str(settings.init_lora_weights).lower() not in _INITS_OF_THE_ADAPTER:
        raise UnsupportedError(
            "this initialisation may have changed the base model's weights, which the adapter does not hold",
            where=f"{where}: {CONFIG_FILE}",
            found=f"init_lora_weights: {shortened(settings.init_lora_weights)}",
            remedy="save it as plain LoRA (save_pretrained with path_initial_model_for_weight_conversion), or " + MERGE_FIRST,
        )
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
