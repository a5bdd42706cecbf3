"""Bases that are mixtures themselves, and whose fine-tunes fit into one plain mixture of the same family: a row of data each.

N fine-tunes of a base with M experts become N x M experts, and a token's top k all come from one (planning/routed.py). The rows
of these families are here alone: in the modekit architecture their class says all (structure.py).
"""

from __future__ import annotations

from typing import Any

from modekit.sources.config import Config, whole, words
from modekit.sources.family import Family
from modekit.sources.native import Native, Routed, Rule, Widening, experts_in
from modekit.sources.stack import LINEAR, Stack

_ATTENTION = {part: LINEAR[part] for part in "qkvo"}
_SILU: Rule = (lambda c: c.get("hidden_act", "silu") in {"silu", "swish"}, "the activation is not SiLU")
_EVERYWHERE: Rule = (
    lambda c: not c.get("mlp_only_layers") and c.get("decoder_sparse_step", 1) == 1,
    "some layers have a plain FFN (mlp_only_layers, decoder_sparse_step), which has no experts to choose",
)
_CHOOSES: Rule = (
    lambda c: 1 <= whole(c, "num_experts_per_tok") <= Routed.count(c),
    "a token has more experts than there are, or none (num_experts_per_tok)",
)
_ONE_KIND: Rule = (
    lambda c: len(set(words(c, "layer_types"))) < 2,
    "layers differ in their attention window",
)
_HEADS_FILL: Rule = (
    lambda c: whole(c, "hidden_size") == whole(c, "head_dim") * whole(c, "num_attention_heads"),
    "head_dim is not hidden_size / num_attention_heads, which this family's engines assume",
)
_DEFAULTS = {
    **{"hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False, "num_key_value_heads": None},
    **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "sliding_window": None},
}
_QUIET = {"output_router_logits": False}
FUSED_IN_GRANITE: dict[str, Any] = {
    "router": "block_sparse_moe.router.layer.weight",
    "experts": None,
    "fused": ("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
    "router_module": "block_sparse_moe.router",
    "block_module": "block_sparse_moe",
    "num_experts_key": "num_local_experts",
    "writes_head_dim": False,
    "serves": "vLLM, llama.cpp",
}
"""Where Granite keeps experts and router, in either kind of row."""


def _is_normed(config: Config) -> bool:
    return bool(config.get("norm_topk_prob"))


def _row(model_type: str, native_class: str, defaults: dict[str, object], ffn: str = "mlp", **says: Any) -> Native:
    family = Family(model_type, stacks=(Stack(parts=_ATTENTION, ffn=ffn),), defaults={**_DEFAULTS, **defaults})
    says["rules"] = (_SILU, _CHOOSES, *says.get("rules", ()))
    return Native(family, model_type, native_class, **{"fixed": _QUIET, "serves": "vLLM, llama.cpp", **says})


ROUTED: tuple[Native, ...] = (
    _row(
        *("qwen3_moe", "Qwen3MoeForCausalLM"),
        {"rms_norm_eps": 1e-6, "norm_topk_prob": False, "num_key_value_heads": 4, "use_sliding_window": False},
        expert_hidden_key="moe_intermediate_size",
        dropped=frozenset({"num_local_experts"}),
        rules=(_EVERYWHERE,),
        widening=Widening(recency=False),  # norms of queries and keys, as in Qwen3
        gguf_differs=((lambda c: not _is_normed(c), "its qwen3moe divides the weights of the chosen experts by their sum"),),
        routed=Routed(sums_to_one=_is_normed),
    ),
    _row(
        *("mixtral", "MixtralForCausalLM"),
        {"rms_norm_eps": 1e-5, "num_key_value_heads": 8, "router_jitter_noise": 0.0},
        router="block_sparse_moe.gate.weight",
        experts=experts_in("block_sparse_moe", "w1", "w3", "w2"),
        num_experts_key="num_local_experts",
        dropped=frozenset({"attention_bias", "num_experts"}),
        routed=Routed(),
    ),
    _row(
        *("qwen2_moe", "Qwen2MoeForCausalLM"),
        {"rms_norm_eps": 1e-6, "norm_topk_prob": False, "num_key_value_heads": 16, "use_sliding_window": False},
        expert_hidden_key="moe_intermediate_size",
        dropped=frozenset({"attention_bias", "num_local_experts"}),
        rules=(_EVERYWHERE, _ONE_KIND, _HEADS_FILL),
        widening=Widening(whole_heads=True),
        gguf_differs=((_is_normed, "its qwen2moe does not divide the weights of the chosen experts by their sum"),),
        routed=Routed(
            shared_down="mlp.shared_expert.down_proj.weight", shared_gate="mlp.shared_expert_gate", sums_to_one=_is_normed
        ),
    ),
    _row(
        *("granitemoe", "GraniteMoeForCausalLM"),
        {
            "rms_norm_eps": 1e-6,
            **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier"), 1.0),
        },
        ffn="block_sparse_moe",
        **FUSED_IN_GRANITE,
        dropped=frozenset({"num_experts", "sliding_window"}),
        rules=(_HEADS_FILL,),
        widening=Widening(whole_heads=True),
        routed=Routed(
            *("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj", "block_sparse_moe.router.weight")
        ),
    ),
)

WHY_NOT = {
    "gpt_oss": "its attention has sinks and its experts clamp and add to what they compute",
    "olmoe": "its norms of queries and keys run over all heads, which further channels would change",
}
"""Type -> why N fine-tunes of such a base are no plain mixture of its family."""
