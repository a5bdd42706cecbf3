"""A mixture within a model that wraps a language model, such as one with a vision tower.

Files and the config's `places` name the language model as its own class does; in memory it lies one module deeper.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PreTrainedConfig, PreTrainedModel

from .configuration_modekit import ModekitConfig, family_config

_PARTS = "layers|norm|embed_tokens_per_layer|embed_tokens|per_layer_model_projection|per_layer_projection_norm"
"""Of a language model beside its head; longer names first."""
_TEXT, _WITHIN = rf"^model\.({_PARTS})", r"model.language_model.\1"
_OTHERS = rf"^(?!model\.({_PARTS})\.|lm_head\.)"
"""Tensors of a checkpoint that are no part of the language model."""


def wraps(config: PreTrainedConfig | type[PreTrainedConfig]) -> bool:
    """Whether a config, or its class, is that of a wrapper."""
    return "text_config" in config.sub_configs


def causal_class(dense_config: type[PreTrainedConfig]) -> tuple[str, type[PreTrainedModel]]:
    """What the class of a family's mixture is called after, and the family's own that writes text."""
    if wraps(dense_config):
        return "ForImageTextToText", MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[dense_config]
    return "ForCausalLM", MODEL_FOR_CAUSAL_LM_MAPPING[dense_config]


def path_of(place: str, config: PreTrainedConfig) -> str:
    """Where a place lies in the whole model."""
    return re.sub(_TEXT, _WITHIN, place) if wraps(config) else place


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the language model alone, as one of a mixture of its own."""
    if not wraps(config):
        return config
    said = {key: value for key, value in config.modekit.items() if key != "wrapper"}
    text = {**config.text_config.to_dict(), "model_type": ModekitConfig.model_type, "modekit": said}
    alone: PreTrainedConfig = family_config(said["dense_type"]).from_dict(text)
    return alone


def renaming(config: PreTrainedConfig) -> dict[str, str] | None:
    """Patterns of names in a checkpoint's files -> what they are in memory; None where they are the same."""
    return {_TEXT: _WITHIN} if wraps(config) else None


@contextmanager
def text_alone(model_class: Any) -> Iterator[None]:
    """While open, the class passes over what lies beside the language model; it is that of mixtures without a wrapper, too."""
    before = model_class._keys_to_ignore_on_load_unexpected
    model_class._keys_to_ignore_on_load_unexpected = [*(before or ()), _OTHERS]
    try:
        yield
    finally:
        model_class._keys_to_ignore_on_load_unexpected = before


def check_complete(config: PreTrainedConfig, missing: Collection[str]) -> None:
    """Raise ValueError where tensors of a wrapper are missing, which transformers would make anew."""
    if missing and wraps(config):
        raise ValueError(f"the checkpoint lacks tensors of the model: {', '.join(sorted(missing)[:3])}")
