"""PEFT adapters that stand before the text: prefixes (PREFIX_TUNING), prompts (PROMPT_TUNING, P_TUNING).

A file holds one tensor. Of a prefix it is (P, L 2 H C), keys and values of every layer side by side, whatever made them in
training; of a prompt (P, D), embeddings that the model reads before the text's own.

Shape legend: P tokens of the prefix, L layers, H heads of keys, C width of a head, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from modekit.errors import UnsupportedError
from modekit.sources.adapter_config import PREFIX_KINDS, checked_settings, damaged, other_base
from modekit.sources.config import Config, whole
from modekit.sources.families import family_of
from modekit.sources.family import Family
from modekit.sources.header import DTYPE_NAMES, TensorRef
from modekit.sources.source import ModelSource

TENSOR = "prompt_embeddings"
_TRAINING = (
    *("prompt_tuning_init", "prompt_tuning_init_text", "prompt_tuning_init_state_dict_path", "tokenizer_name_or_path"),
    *("tokenizer_kwargs", "prefix_projection", "encoder_hidden_size", "encoder_reparameterization_type", "encoder_num_layers"),
    *("encoder_dropout", "init_weights", "num_attention_heads", "token_dim"),
)
"""Settings of how the tensor was made; its shape says the rest."""
_OTHER_ATTENTION = {
    "qwen3_5_text": "most of its layers have linear attention, which reads no keys",
    "gemma4_text": "its last layers read the keys of earlier ones",
}


@dataclass(frozen=True)
class SoftPrefix:
    """What stands before the text; `layers` is how many layers `ref` has keys and values of, 0 of a prompt."""

    ref: TensorRef
    layers: int = 0

    @property
    def tokens(self) -> int:
        """P."""
        return self.ref.shape[0]

    def columns(self, layer: int) -> tuple[int, int]:
        """From and to which column of the tensor a layer's keys and values stand; of a prompt, all."""
        width = self.ref.shape[1] // max(self.layers, 1)
        return (layer * width, (layer + 1) * width) if self.layers else (0, width)


class _Settings(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    peft_type: Literal["PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"]
    num_virtual_tokens: Annotated[int, Field(ge=1, le=2**20)]
    num_layers: int | None = None
    num_transformer_submodules: Literal[1] | None = None


def is_prefix(config: Config) -> bool:
    """Whether adapter_config.json is of an adapter that stands before the text."""
    return config["peft_type"] in PREFIX_KINDS


def read_prefix(config: Config, tensors: Mapping[str, TensorRef], base: ModelSource, *, where: str) -> SoftPrefix:
    """What an adapter's files say stands before the text. Raises SourceError, MismatchError, UnsupportedError."""
    remedy = "train it without the setting"
    settings = checked_settings(_Settings, config, "a prefix", where=where, remedy=remedy, without_effect=_TRAINING)
    family = _family(base, where)
    ref = tensors.get(TENSOR)
    if ref is None or len(tensors) > 1 or ref.dtype not in DTYPE_NAMES:
        found = ", ".join(sorted(tensors)[:3]) or "no tensor"
        raise damaged("the file does not hold one prefix", where, found, TENSOR)
    full, layers = family.dense_config(base.config), 0
    width = family.hidden(base.config)
    if settings.peft_type == "PREFIX_TUNING":
        layers = whole(full, "num_hidden_layers")
        width = layers * 2 * whole(full, "num_key_value_heads") * whole(full, "head_dim")
    if ref.shape != (settings.num_virtual_tokens, width) or settings.num_layers not in (None, whole(full, "num_hidden_layers")):
        expected = [settings.num_virtual_tokens, width]
        raise other_base("the prefix does not fit the base model", f"{where}: {TENSOR}", list(ref.shape), expected)
    return SoftPrefix(ref, layers)


def _family(base: ModelSource, where: str) -> Family:
    """The base's, whose attention takes keys before a text's."""
    family = family_of(base.config, where=base.where)
    without = _OTHER_ATTENTION.get(family.model_type, "it has an encoder" if family.pair else "")
    if family.derived is not None:
        without = "it has no row in modekit's table, so that nobody knows how its attention takes keys"
    if without:
        raise UnsupportedError(
            f"a '{family.model_type}' model takes no prefix here: {without}",
            where=where,
            remedy="train a LoRA adapter, or choose another base",
        )
    return family
