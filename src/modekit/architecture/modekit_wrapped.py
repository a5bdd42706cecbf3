"""A mixture within a model that wraps a language model, such as one with a vision tower.

Files and the config's `places` name the language model as its own class does; in memory it lies one module deeper.
"""

from __future__ import annotations

import re
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from .configuration_modekit import ModekitConfig, family_config

_PARTS = "layers|norm|embed_tokens_per_layer|embed_tokens|per_layer_model_projection|per_layer_projection_norm"
"""Of a language model beside its head; longer names first."""
_TEXT, _WITHIN = rf"^model\.({_PARTS})", r"model.language_model.\1"
OTHERS = rf"^(?!model\.({_PARTS})\.|lm_head\.)"
"""Tensors of a checkpoint that are no part of the language model."""


def wraps(config: Any) -> bool:
    """Whether a mixture's config, or its class, is that of a wrapper."""
    return "text_config" in config.sub_configs and config.sub_configs["text_config"] is not None


def causal_class(dense_config: Any) -> tuple[str, Any]:
    """What the class of a family's mixture is called after, and the family's own that writes text."""
    if wraps(dense_config):
        return "ForImageTextToText", MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[dense_config]
    return "ForCausalLM", MODEL_FOR_CAUSAL_LM_MAPPING[dense_config]


def path_of(place: str, config: Any) -> str:
    """Where a place lies in the whole model."""
    return re.sub(_TEXT, _WITHIN, place) if wraps(config) else place


def text_config(config: Any) -> Any:
    """The config of the language model alone, as one of a mixture of its own."""
    if not wraps(config):
        return config
    said = {key: value for key, value in config.modekit.items() if key != "wrapper"}
    text = {**config.text_config.to_dict(), "model_type": ModekitConfig.model_type, "modekit": said}
    return family_config(said["dense_type"]).from_dict(text)


def opened(kind: Any, path: Any, *args: Any, config: Any, **kwargs: Any) -> Any:
    """A model from a checkpoint. Raises ValueError where tensors of a wrapper are missing, which would be made anew."""
    if not wraps(config):
        return kind.from_pretrained(path, *args, config=config, **kwargs)
    asked = kwargs.pop("output_loading_info", False)
    kwargs |= {"key_mapping": {_TEXT: _WITHIN}, "output_loading_info": True}
    model, info = kind.from_pretrained(path, *args, config=config, **kwargs)
    if info["missing_keys"]:
        raise ValueError(f"{path} lacks tensors of the model: {', '.join(sorted(info['missing_keys'])[:3])}")
    return (model, info) if asked else model
