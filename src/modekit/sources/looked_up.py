"""Dense families that are looked up in their class (derived.py), and have a row for what a native partner asks alone."""

from __future__ import annotations

from modekit.sources.family import LINEAR, Config, Family, Stack, whole, words


def _lfm2_kinds(config: Config) -> list[str]:
    """LFM2: attention in the layers that are named, a short convolution in the others."""
    layers = range(whole(config, "num_hidden_layers"))
    attends = words(config, "full_attn_idxs") if config.get("full_attn_idxs") is not None else layers
    return ["full_attention" if layer in attends else "conv" for layer in layers]


_LLAMA = {"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False, "hidden_act": "silu", "rms_norm_eps": 1e-6}
_SHARED_INPUT = "shared_mlp.input_linear"
_NO_BIAS = {"attention_bias": False, "mlp_bias": False}

LOOKED_UP: tuple[Family, ...] = (
    Family(
        model_type="granitemoehybrid",
        is_variant=lambda config: config.get("num_local_experts") == 0,
        stacks=(
            Stack(
                parts={**LINEAR, "gate": _SHARED_INPUT, "up": _SHARED_INPUT, "down": "shared_mlp.output_linear"},
                ffn="shared_mlp",
                ffn_width="shared_intermediate_size",
            ),
        ),
        defaults={
            **{**_LLAMA, "max_position_embeddings": 2048, "attention_bias": False},
            **{"mamba_n_heads": 128, "mamba_d_state": 256, "mamba_chunk_size": 256},
        },
    ),
    Family(
        model_type="lfm2",
        rope_theta=1_000_000.0,
        stacks=(
            Stack(
                parts={
                    **{**LINEAR, "o": "self_attn.out_proj"},
                    **{"gate": "feed_forward.w1", "up": "feed_forward.w3", "down": "feed_forward.w2"},
                },
                ffn="feed_forward",
            ),
        ),
        defaults={
            **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True},
            **{"max_position_embeddings": 128_000, "norm_eps": 1e-5, "num_key_value_heads": 8},
        },
        layer_types=_lfm2_kinds,
    ),
    Family(
        model_type="ministral",
        defaults={**_LLAMA, "max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
        layer_types=lambda c: (
            ["sliding_attention" if c["sliding_window"] else "full_attention"] * whole(c, "num_hidden_layers")
        ),
    ),
    Family(
        model_type="exaone",
        rope_theta=500_000.0,
        same_as={"num_hidden_layers": "num_layers", "rms_norm_eps": "layer_norm_epsilon", "hidden_act": "activation_function"},
        defaults={
            **{**_LLAMA, **_NO_BIAS, "pad_token_id": 0, "eos_token_id": 361, "rms_norm_eps": 1e-5},
            **{"max_position_embeddings": 4096, "num_key_value_heads": 8},
        },
    ),
    Family(
        model_type="internlm3",
        head_dim=128,
        same_as={"attention_bias": "qkv_bias", "mlp_bias": "bias"},
        defaults={
            **{**_LLAMA, **_NO_BIAS, "pad_token_id": 2, "rms_norm_eps": 1e-5},
            **{"max_position_embeddings": 32_768, "num_key_value_heads": 2},
        },
    ),
    Family(
        model_type="iquestcoder",
        head_dim=128,
        defaults={
            **{**_LLAMA, **_NO_BIAS, "rms_norm_eps": 1e-5, "max_position_embeddings": 131_072, "num_key_value_heads": 8},
        },
    ),
    Family(
        model_type="helium",
        head_dim=128,
        rope_theta=100_000.0,
        defaults={
            **{**_LLAMA, **_NO_BIAS, "pad_token_id": 3, "rms_norm_eps": 1e-8},
            **{"max_position_embeddings": 4096, "num_key_value_heads": 20},
        },
    ),
    Family(
        model_type="cohere",
        rope_theta=500_000.0,
        defaults={
            **{"pad_token_id": 0, "bos_token_id": 5, "eos_token_id": 255_001, "tie_word_embeddings": True},
            **{"hidden_act": "silu", "layer_norm_eps": 1e-5, "max_position_embeddings": 8192, "attention_bias": False},
            **{"logit_scale": 0.0625, "use_qk_norm": False},
        },
    ),
    Family(
        model_type="granite_swa",
        defaults={
            **{**_LLAMA, **_NO_BIAS, "bos_token_id": 100_257, "eos_token_id": 100_257, "tie_word_embeddings": True},
            **{"rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "num_key_value_heads": 4, "sliding_window": 128},
            **{"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0, "attention_multiplier": 1.0},
        },
        layer_types=lambda c: [
            "sliding_attention" if layer % 4 else "full_attention" for layer in range(whole(c, "num_hidden_layers"))
        ],
    ),
)
