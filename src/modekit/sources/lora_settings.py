"""The settings of a LoRA adapter that shape the weights, checked, and the patterns of names among them."""

from __future__ import annotations

import math
import re
import time
from functools import partial
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, Field, ValidationError

from modekit.errors import UnsupportedError
from modekit.files.typed import shortened
from modekit.sources.config import Config, damaged_model

if TYPE_CHECKING:
    import regex

MERGE_FIRST = "merge it into its base with PEFT (merge_and_unload, then save_pretrained) and give the full model"
_MOST_SECONDS = 10.0  # that all patterns of an adapter take to match
_MOST_REPETITIONS = 10_000  # {n} of a pattern, one in the other: regex unrolls them
_Alpha = Annotated[float, Field(gt=-1e30, lt=1e30, allow_inf_nan=False)]
_Pattern = Annotated[str, Field(max_length=1000)]
NO_EFFECT = {
    "peft_type",
    "peft_version",
    "task_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "lora_dropout",
    "runtime_config",
    "megatron_core",
    "qalora_group_size",
    # which modules and ranks there are, the file says
    "exclude_modules",
    "layers_pattern",
    "bias",
    "fan_in_fan_out",
    # read only while the matching init_lora_weights initialises; those that change the base are refused there
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
}
"""Settings that say nothing about what the saved tensors do."""
_INITS_OF_THE_ADAPTER = frozenset({"true", "false", "none", "gaussian", "eva", "orthogonal", "mica"})
"""Initialisations that leave the base's weights alone; the others (pissa, olora, corda, loftq, lora_ga) change them."""

damaged = partial(damaged_model, remedy="download or save the adapter again")
"""The error of an adapter that contradicts itself."""


class LoraSettings(BaseModel, strict=True, frozen=True):
    """What of the settings of LoRA, rsLoRA and DoRA shapes the weights, with PEFT's defaults."""

    r: int = Field(8, ge=1, le=2**20)
    rank_pattern: dict[_Pattern, Annotated[int, Field(ge=1, le=2**20)]] | None = Field(None, max_length=10_000)
    lora_alpha: _Alpha = 8.0
    use_rslora: bool = False
    use_dora: bool = False
    alpha_pattern: dict[_Pattern, _Alpha] | None = Field(None, max_length=10_000)
    init_lora_weights: bool | str | None = True
    modules_to_save: list[str] | None = Field(None, max_length=10_000)
    target_parameters: list[str] | None = Field(None, max_length=10_000)
    ensure_weight_tying: bool = False
    target_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None


def lora_settings(config: Config, *, where: str) -> LoraSettings:
    """Raises SourceError for values of the wrong kind, UnsupportedError for what is not LoRA, or not known to be."""
    if config["peft_type"] != "LORA":
        raise UnsupportedError(
            "an adapter of this kind cannot be read",
            where=where,
            found=f"peft_type {shortened(config['peft_type'])}",
            expected="LORA",
            remedy=MERGE_FIRST,
        )
    known = {*LoraSettings.model_fields, *NO_EFFECT}
    for key, value in config.items():
        if key not in known and value not in (None, False, [], {}, ""):
            raise UnsupportedError(
                "modekit does not know what this setting does to the weights",
                where=where,
                found=f"{key}: {shortened(value)}",
                remedy=MERGE_FIRST,
            )
    try:
        settings = LoraSettings.model_validate(dict(config))
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0])
        raise damaged(
            f"{key} has no usable value",
            where,
            shortened(config.get(key, "nothing")),
            error.errors()[0]["msg"],
        ) from None
    if str(settings.init_lora_weights).lower() not in _INITS_OF_THE_ADAPTER:
        raise UnsupportedError(
            "this initialisation may have changed the base model's weights, which the adapter does not hold",
            where=where,
            found=f"init_lora_weights: {shortened(settings.init_lora_weights)}",
            remedy="save it as plain LoRA (save_pretrained with path_initial_model_for_weight_conversion), or " + MERGE_FIRST,
        )
    return settings


class Patterns:
    """Patterns of one adapter and the names that they match; all matches together have a limited time."""

    def __init__(self) -> None:
        self._compiled: dict[str, regex.Pattern[str]] = {}
        self._seconds_left = _MOST_SECONDS

    def match(self, pattern: str, module: str) -> bool:
        """Raises TimeoutError when all matches of the adapter together take too long, OverflowError, and regex's errors."""
        import regex  # which stops when it is told to, as `re` does not

        if pattern not in self._compiled:
            counts = (int(count) for count in re.findall(r"[{,]\s*(\d+)", pattern))
            if math.prod(max(1, count) for count in counts) > _MOST_REPETITIONS:
                raise OverflowError("too many repetitions")
            self._compiled[pattern] = regex.compile(rf"(.*\.)?({pattern})")
        if self._seconds_left <= 0:
            raise TimeoutError("no time is left for it")
        began = time.monotonic()
        matched = self._compiled[pattern].fullmatch(module, timeout=self._seconds_left)
        self._seconds_left -= time.monotonic() - began
        return matched is not None
