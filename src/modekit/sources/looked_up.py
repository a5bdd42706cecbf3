"""Dense families that are looked up in their class (derived.py), and have a row for what a native partner asks alone."""

from __future__ import annotations

from modekit.sources.family import LINEAR, Config, Family, Stack, whole, words


def _lfm2_kinds(config: Config) -> list[str]:
    """LFM2: attention in the layers that are named, a short convolution in the others."""
    layers = range(whole(config, "num_hidden_layers"))
    attends = words(config, "full_attn_idxs") if config.get("full_attn_idxs") is not None else layers
    return ["full_attention" if layer in attends else "conv" for layer in layers]


LOOKED_UP: tuple[Family, ...] = (
    Family(
        model_type="granitemoehybrid",
        is_variant=lambda config: config.get("num_local_experts") == 0,
        stacks=(
            Stack(
                parts={
                    **LINEAR,
                    **dict.fromkeys(("gate", "up"), "shared_mlp.input_linear"),
                    "down": "shared_mlp.output_linear",
                },
                ffn="shared_mlp",
                ffn_width="shared_intermediate_size",
            ),
        ),
        defaults={
            **{"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False, "hidden_act": "silu"},
            **{"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "attention_bias": False},
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
)
