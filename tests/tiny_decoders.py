"""A small random model of any type that transformers' causal mapping has, by one crude rule: whatever is a size is small."""

from __future__ import annotations

from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
LAYERS, WIDTH, HEADS, VOCABULARY = 2, 32, 4, 96

_WIDTHS = (
    "hidden_size",
    "d_model",
    "n_embd",
    "embed_dim",
    "dim",
    "embedding_size",
    "n_embed",
    "word_embed_proj_dim",
    "emb_dim",
)
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
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "rotary_dim", "swa_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "index_head_dim", "lru_width"), 16),
    **dict.fromkeys(
        ("mamba_n_heads", "mamba_num_heads", "index_n_heads", "mamba_d_state", "ssm_state_size", "mamba_n_groups"), 4
    ),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "linear_num_key_heads", "n_groups", "n_group"), 2),
    **dict.fromkeys(("linear_num_value_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "shape_vocab_size", "pronunciation_vocab_size"), VOCABULARY),
    **dict.fromkeys(("unpadded_vocab_size", "padded_vocab_size"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 128),
    **dict.fromkeys(("num_dense_layers", "first_k_dense_replace", "attn_layer_offset", "topk_group"), 1),
    **dict.fromkeys(("attn_layer_period", "expert_layer_period"), 2),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "is_decoder": True,
    "attention_dropout": 0.0,
    "sliding_window": 16,
}
"""Key of a config, where it has it -> what a small model has."""
OWN: dict[str, dict[str, Any]] = {
    "mamba2": {"head_dim": 16},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "local"], "attention_head_size": 8, "num_buckets": 2},
    "nemotron_h": {"layers_block_type": ["attention", "mamba"]},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10_000.0}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}, "ffn_config": {"ffn_hidden_size": 48}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "laurel_rank": 4},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "num_heads": 2, "chunk_size": 16},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"], "attention_hidden_size": 64, "attention_head_dim": 16},
    "qwen4_exp_text": {
        **dict.fromkeys(("indexer_n_heads", "hc_count", "hc_lowrank", "heads_per_ngram", "split_ngram_parts"), 2),
        **{
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 16,
            "indexer_compress_ratio": 4,
            "ngram_vocab_size_base": 64,
        },
    },
}
"""What one type alone needs."""


def tiny_config(model_type: str, **says: Any) -> PreTrainedConfig:
    """A config of a type with everything small; `says` are settings of its own."""
    default = CONFIG_MAPPING[model_type]()
    return AutoConfig.for_model(model_type, **{**_small(default), **OWN.get(model_type, {}), **says})


def _small(default: PreTrainedConfig) -> dict[str, Any]:
    given = default.to_dict()
    names = getattr(default, "attribute_map", {})
    made = {names.get(key, key): value for key, value in SIZES.items() if names.get(key, key) in given}
    made = {key: value for key, value in made.items() if given[key] is not None or not key.endswith(("lora_rank", "window"))}
    if "kv_lora_rank" in given and "num_key_value_heads" in made:
        made["num_key_value_heads"] = HEADS
    count = next((given[key] for key in [names.get(key, key) for key in _LAYERS] if key in given), None)
    for key, value in given.items():
        if isinstance(value, list) and value and len(value) == count:
            made[key] = _both(value)
        if isinstance(value, dict) and "model_type" in value:
            made[key] = _small(getattr(default, key))
    return made


def _both(values: list[Any]) -> list[Any]:
    """One layer of the first kind of attention, and one of the first other kind."""
    kinds = list(dict.fromkeys(map(str, values)))
    full = [kind for kind in kinds if "attention" in kind and "linear" not in kind][:1] or kinds[:1]
    chosen = (full + [kind for kind in kinds if kind not in full])[:LAYERS]
    return [next(value for value in values if str(value) == kind) for kind in (chosen * LAYERS)[:LAYERS]]


def tiny_decoder(model_type: str, seed: int = 0, **says: Any) -> PreTrainedModel:
    """A small random model of a type; no tensor of it is constant."""
    torch.manual_seed(seed)
    config = tiny_config(model_type, **says)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model
