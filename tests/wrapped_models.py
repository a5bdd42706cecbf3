"""Tiny models that wrap a language model, as their own classes make and save them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from conftest import SMALL, save

_TEXT = {**SMALL, "head_dim": 8}
_WINDOWS = ["sliding_attention", "sliding_attention", "full_attention"]
_TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
_GEMMA4 = {
    "vision_config": {**_TOWER, "num_key_value_heads": 2, "head_dim": 8, "model_type": "gemma4_vision", "patch_size": 4},
    "audio_config": None,
    "image_token_id": 90,
    "video_token_id": 91,
    "audio_token_id": 92,
}
_GEMMA4_TEXT = {
    "layer_types": _WINDOWS,
    "sliding_window": 6,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 4,
    "vocab_size_per_layer_input": SMALL["vocab_size"],
}
_MISTRAL3 = {
    "vision_config": {**_TOWER, "head_dim": 8, "image_size": 16, "patch_size": 4, "model_type": "pixtral"},
    "image_token_index": 90,
    "spatial_merge_size": 2,
}
WRAPPED: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_5": (
        "qwen3_5",
        {
            "text_config": {
                **_TEXT,
                "model_type": "qwen3_5_text",
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 8,
                "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            },
            "vision_config": {
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_heads": 2,
                "patch_size": 4,
                "temporal_patch_size": 2,
                "spatial_merge_size": 2,
                "out_hidden_size": 32,
                "num_position_embeddings": 16,
            },
            "image_token_id": 90,
            "video_token_id": 91,
            "vision_start_token_id": 92,
            "vision_end_token_id": 93,
        },
    ),
    "gemma3": (
        "gemma3",
        {
            "text_config": {**_TEXT, "model_type": "gemma3_text", "layer_types": _WINDOWS, "sliding_window": 6},
            "vision_config": {**_TOWER, "image_size": 16, "patch_size": 4, "model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4,
            "image_token_index": 90,
            "boi_token_index": 91,
            "eoi_token_index": 92,
        },
    ),
    "mistral3": ("mistral3", {"text_config": {**_TEXT, "model_type": "mistral"}, **_MISTRAL3, "tie_word_embeddings": False}),
    "ministral3": (
        "mistral3",
        {"text_config": {**_TEXT, "model_type": "ministral3"}, **_MISTRAL3, "tie_word_embeddings": True},
    ),
    "gemma4": (
        "gemma4",
        {
            "text_config": {**_TEXT, "model_type": "gemma4_text", **_GEMMA4_TEXT},
            **_GEMMA4,
        },
    ),
    "gemma4 shared": (
        "gemma4",
        {
            "text_config": {
                **_TEXT,
                "model_type": "gemma4_text",
                **_GEMMA4_TEXT,
                "num_hidden_layers": 4,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "num_kv_shared_layers": 2,
                "use_double_wide_mlp": True,
                "attention_k_eq_v": True,
                "num_global_key_value_heads": 1,
            },
            **_GEMMA4,
        },
    ),
}
"""What a case is called -> `model_type` of the wrapper, and its settings."""


def wrapped_config(case: str, **overrides: Any) -> Any:
    """Settings of a wrapper; `overrides` are its language model's."""
    kind, said = WRAPPED[case]
    return AutoConfig.for_model(kind, **{**said, "text_config": {**said["text_config"], **overrides}})


def wrapped_model(case: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A small random wrapper, tower and all. Norm weights are random too, so that a lost one shows."""
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(wrapped_config(case, **overrides)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(3.0)
        for parameter in model.parameters():
            if not parameter.any():  # as Gemma 3 begins, blind
                parameter.normal_()
    return model


def text_model(wrapper: PreTrainedModel) -> PreTrainedModel:
    """The language model of a wrapper in its own class, with the same weights."""
    config = wrapper.config.get_text_config()
    config.tie_word_embeddings = wrapper.config.tie_word_embeddings
    model = AutoModelForCausalLM.from_config(config).eval()
    model.model.load_state_dict(wrapper.model.language_model.state_dict())
    model.lm_head.load_state_dict(wrapper.lm_head.state_dict())
    return model


def save_wrapped(case: str, folder: Path, seed: int = 0, **overrides: Any) -> Path:
    """Saved by the wrapper's own class."""
    return save(wrapped_model(case, seed, **overrides), folder)
