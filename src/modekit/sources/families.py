"""Dense families of one stack, a decoder each: where its parts live and what its config.json leaves unsaid. A row of data each.

A row plans without torch, and can have a partner in natives.py. The rows of gemma and below have none: they stand for families
that vLLM serves in the modekit architecture. Every other causal language model of transformers is known by its class
(structure.py); families with an encoder are in pairs.py. tests/sources/test_families.py compares each row with its class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from modekit.errors import UnsupportedError
from modekit.sources.config import Config, no_usable, whole
from modekit.sources.family import Family
from modekit.sources.pairs import PAIRS
from modekit.sources.stack import LINEAR, Stack
from modekit.sources.structure import structure

_FUSED_GATE_UP = {**LINEAR, **dict.fromkeys(("gate", "up"), "mlp.gate_up_proj")}
_FUSED = {**_FUSED_GATE_UP, **dict.fromkeys("qkv", "self_attn.qkv_proj")}
_SILU = {"hidden_act": "silu", "tie_word_embeddings": False}
_LLAMA = {**_SILU, "bos_token_id": 1, "eos_token_id": 2, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
_WIDE = {**_LLAMA, "max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096}
_FACTORS = ("embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier")
_NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_QWEN = {**_SILU, **_NO_TOKENS, "rms_norm_eps": 1e-6, "max_position_embeddings": 32_768}
_QWEN_WINDOW = {**_QWEN, "use_sliding_window": False, "max_window_layers": 28, "sliding_window": None}
_TANH = "gelu_pytorch_tanh"
_GEMMA = {"tie_word_embeddings": True, "rms_norm_eps": 1e-6, "num_key_value_heads": 4, "sliding_window": 4096}
_GEMMA_2 = {**_GEMMA, "hidden_activation": _TANH, "query_pre_attn_scalar": 256}


def _every(key: str, default: int, most: str) -> Callable[[Config], list[str]]:
    """Layer types: one full-attention layer in every `config[key]`, the others `most`."""

    def kinds(config: Config) -> list[str]:
        period = config.get(key) or default
        if not isinstance(period, int):
            raise no_usable(key, period, "a whole number of layers")
        return ["full_attention" if (layer + 1) % period == 0 else most for layer in range(whole(config, "num_hidden_layers"))]

    return kinds


def _windows_after(config: Config) -> list[str]:
    """Qwen2 and Qwen3: the layers from max_window_layers on have the window, if there is one."""
    layers = whole(config, "num_hidden_layers")
    first = whole(config, "max_window_layers")
    windowed = config.get("sliding_window") is not None
    return ["sliding_attention" if windowed and layer >= first else "full_attention" for layer in range(layers)]


def _rope_by_kind(theta: float) -> Callable[[Config], Config]:
    """Rotary settings by kind of attention, as since transformers 5; before, those of windows were one number, or `theta`."""

    def meant(config: Config) -> Config:
        rope = config["rope_parameters"]
        assert isinstance(rope, Mapping)
        local = {"rope_type": "default", "rope_theta": config.get("rope_local_base_freq") or theta}
        kinds = rope if "full_attention" in rope else {"full_attention": rope, "sliding_attention": local}
        said = {kind: kinds.get(kind) for kind in ("full_attention", "sliding_attention")}
        return {**config, "rope_parameters": said, "rope_local_base_freq": None}

    return meant


DECODERS: tuple[Family, ...] = (
    Family("llama", defaults={**_LLAMA, "attention_bias": False}),
    Family("mistral", defaults=_WIDE),
    Family("qwen2", defaults=_QWEN_WINDOW, layer_types=_windows_after),
    Family("qwen3", head_dim=128, defaults={**_QWEN_WINDOW, "attention_bias": False}, layer_types=_windows_after),
    Family("granite", defaults={**_LLAMA, "attention_bias": False, **dict.fromkeys(_FACTORS, 1.0)}),
    Family(
        "olmo2",
        defaults={
            **_SILU,
            "pad_token_id": 1,
            "bos_token_id": None,
            "eos_token_id": 50_279,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 2048,
            "attention_bias": False,
        },
    ),
    Family(
        "cohere2",
        defaults={
            "pad_token_id": 0,
            "bos_token_id": 5,
            "eos_token_id": 255_001,
            "tie_word_embeddings": True,
            "layer_norm_eps": 1e-5,
            "max_position_embeddings": 8192,
            "hidden_act": "silu",
            "attention_bias": False,
            "logit_scale": 0.0625,
            "sliding_window": 4096,
        },
        layer_types=_every("sliding_window_pattern", 4, "sliding_attention"),
    ),
    Family(
        "ernie4_5",
        head_dim=128,
        rope_theta=500_000.0,
        defaults={
            **_LLAMA,
            "pad_token_id": 0,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131_072,
            "use_bias": False,
            "num_key_value_heads": 2,
        },
    ),
    Family(
        "hunyuan_v1_dense",
        heads_first=("self_attn.query_layernorm", "self_attn.key_layernorm"),
        defaults={**_LLAMA, "pad_token_id": 0, "rms_norm_eps": 1e-5, "attention_bias": False},
    ),
    Family(
        "phi3",
        stacks=(Stack(parts=_FUSED),),
        defaults={
            **_SILU,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "sliding_window": None,
            "pad_token_id": 32_000,
            "bos_token_id": 1,
            "eos_token_id": 32_000,
        },
    ),
    Family(
        "qwen3_5_text",
        head_dim=256,
        rotary=0.25,
        defaults={
            **_QWEN,
            "attention_bias": False,
            "num_key_value_heads": 4,
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
        },
        layer_types=_every("full_attention_interval", 4, "linear_attention"),
        without_vllm="its linear attention is no attention to the backend by which vLLM runs transformers' classes",
    ),
    Family(
        "gemma",
        head_dim=256,
        defaults={"tie_word_embeddings": True, "hidden_act": _TANH, "rms_norm_eps": 1e-6, "num_key_value_heads": 16},
    ),
    Family(
        "gemma2",
        head_dim=256,
        defaults={**_GEMMA_2, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
        layer_types=_every("", 2, "sliding_attention"),
    ),
    Family(
        "gemma3_text",
        heads_first=("self_attn.q_norm", "self_attn.k_norm"),
        head_dim=256,
        rope_theta=1_000_000.0,
        defaults={**_GEMMA_2, "vocab_size": 262_208, "num_attention_heads": 8},
        layer_types=_every("sliding_window_pattern", 6, "sliding_attention"),
        meant=_rope_by_kind(10_000.0),
    ),
    Family(
        "olmo3",
        rope_theta=500_000.0,
        defaults={**_SILU, "rms_norm_eps": 1e-5, "sliding_window": 4096},
        layer_types=_every("sliding_window_pattern", 4, "sliding_attention"),
        meant=_rope_by_kind(500_000.0),
    ),
    Family(
        "exaone4",
        heads_first=("self_attn.q_norm", "self_attn.k_norm"),
        defaults={**_SILU, "rms_norm_eps": 1e-5, "num_key_value_heads": 32, "sliding_window": 4096},
        layer_types=_every("sliding_window_pattern", 4, "sliding_attention"),
    ),
    Family(
        "glm4",
        stacks=(Stack(parts=_FUSED_GATE_UP),),
        head_dim=128,
        rotary=0.5,
        defaults={**_SILU, "rms_norm_eps": 1.5625e-07, "num_key_value_heads": 2, "attention_bias": True},
    ),
    Family(
        "starcoder2",
        stacks=(Stack(parts={**{part: LINEAR[part] for part in "qkvo"}, "up": "mlp.c_fc", "down": "mlp.c_proj"}),),
        defaults={
            "hidden_act": _TANH,
            "norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
            "num_key_value_heads": 2,
            "use_bias": True,
        },
    ),
)

FAMILIES: tuple[Family, ...] = (*DECODERS, *PAIRS)
"""Those that are known by their row alone."""


def family_of(config: Config, *, where: str) -> Family:
    """The family of a dense config: its row, or what its class is. Raises UnsupportedError when there is neither."""
    row = row_of(config)
    if row is not None:
        return row
    if is_class_alone(config):
        return structure(config, where=where).family
    wraps = ": it wraps a language model; give that part alone (its text_config and weights)"
    raise UnsupportedError(
        f"models of the family '{config.get('model_type')}' cannot be mixed{wraps if 'text_config' in config else ''}",
        where=where,
        expected=f"a family of {', '.join(sorted({row.model_type for row in FAMILIES}))}",
        remedy="choose a base model of one of these families",
    )


def row_of(config: Config) -> Family | None:
    """The row of a dense config; None where there is none."""
    for family in FAMILIES:
        alone = family.pair and config.get("is_encoder_decoder") is False  # a decoder of such a family, by itself
        if family.model_type == config.get("model_type") and family.is_variant(config) and not alone:
            return family
    return None


def is_class_alone(config: Config) -> bool:
    """Whether a model is known by its class in transformers, which is imported without torch, and by no row."""
    if row_of(config) is not None or "text_config" in config:
        return False
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return config.get("model_type") in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
