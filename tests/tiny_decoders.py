"""A small random model of any type that transformers' causal mapping has, by one crude rule: whatever is a size is small."""

from __future__ import annotations

from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
LAYERS, WIDTH, HEADS, VOCABULARY = 2, 32, 4, 96

_WIDTHS = ("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "embedding_size", "n_embed", "word_embed_proj_dim", "emb_dim")
_LAYERS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "num_decoder_layers"),
    "num_encoder_layers",
)
_HEADS = (
    *("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads"),
    *("num_decoder_attention_heads", "num_encoder_attention_heads"),
)
_FFN = (
    *("intermediate_size", "ffn_dim", "d_ff", "ffn_hidden_size", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "dim_ff"),
    *("moe_intermediate_size", "shared_expert_intermediate_size", "d_inner", "dff", "expert_ffn_hidden_size"),
)
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")
SIZES: dict[str, Any] = {
    **dict.fromkeys(_WIDTHS, WIDTH),
    **dict.fromkeys(_LAYERS, LAYERS),
    **dict.fromkeys(_HEADS, HEADS),
    **dict.fromkeys(_FFN, 48),
    **dict.fromkeys(_EXPERTS, 4),
    **dict.fromkeys(_TOP_K, 2),
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "is_decoder": True,
    "attention_dropout": 0.0,
    "sliding_window": 16,
}
"""Key of a config, where it has it -> what a small model has."""


def tiny_config(model_type: str, **says: Any) -> PreTrainedConfig:
    """A config of a type with everything small; `says` are settings of its own."""
    config_class = CONFIG_MAPPING[model_type]
    default = config_class()
    return AutoConfig.for_model(model_type, **_small(default), **says)


def _small(default: PreTrainedConfig) -> dict[str, Any]:
    given = default.to_dict()
    names = getattr(default, "attribute_map", {})
    made = {names.get(key, key): value for key, value in SIZES.items() if hasattr(default, key)}
    for key, value in given.items():
        if key == "layer_types" or (isinstance(value, list) and len(value) == getattr(default, "num_hidden_layers", -1) > LAYERS):
            made[key] = _both(value)
    return made


def _both(values: list[Any] | None) -> list[Any] | None:
    """One layer of each of the first two kinds."""
    if not values:
        return None
    kinds = list(dict.fromkeys(map(str, values)))
    first = [next(value for value in values if str(value) == kind) for kind in kinds[:LAYERS]]
    return (first * LAYERS)[:LAYERS]


def tiny_decoder(model_type: str, seed: int = 0, **says: Any) -> PreTrainedModel:
    """A small random model of a type; no tensor of it is constant."""
    torch.manual_seed(seed)
    config = tiny_config(model_type, **says)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model
