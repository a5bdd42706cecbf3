"""Rows of families with a partner that no other has: most often the mixture of experts of the same series."""

from __future__ import annotations

from typing import Any

from modekit.sources.family import Config, words
from modekit.sources.native_row import Constant, Native, Widening
from modekit.sources.native_rules import FAMILY, HEADS_ARE_NORMED, NO_ATTENTION, NO_MLP_BIAS, SILU, heads_fill, mapping


def _no_window(config: Config) -> bool:
    return "sliding_attention" not in words(config, "layer_types")


def _partner(model_type: str, native_type: str, native_class: str) -> dict[str, Any]:
    return {"family": FAMILY[model_type], "native_type": native_type, "native_class": native_class}


def _shared(module: str, hidden: str = "0") -> tuple[Constant, ...]:
    """An expert that all tokens have, and that adds nothing."""
    shapes = {"gate": (hidden, "D"), "up": (hidden, "D"), "down": ("D", hidden)}
    return tuple(Constant(f"mlp.{module}.{part}_proj.weight", shape) for part, shape in shapes.items())


_RENORMALISED = {"norm_topk_prob": True, "output_router_logits": False}
_IN_EVERY_LAYER: Config = {"decoder_sparse_step": 1, "mlp_only_layers": []}
IN_THEIR_OWN: tuple[Native, ...] = (
    Native(
        **_partner("qwen2", "qwen2_moe", "Qwen2MoeForCausalLM"),
        expert_hidden_key="moe_intermediate_size",
        fixed={**_RENORMALISED, **_IN_EVERY_LAYER, "qkv_bias": True, "shared_expert_intermediate_size": 0},
        constants=(*_shared("shared_expert"), Constant("mlp.shared_expert_gate.weight", ("1", "D"))),
        serves="vLLM; llama.cpp as a Mixtral with biases (modekit export --gguf)",
        widening=Widening(whole_heads=True),
        rules=(SILU, heads_fill("Qwen2-MoE")),
    ),
    Native(
        **_partner("qwen3", "qwen3_moe", "Qwen3MoeForCausalLM"),
        expert_hidden_key="moe_intermediate_size",
        fixed={**_RENORMALISED, **_IN_EVERY_LAYER, "use_sliding_window": False, "sliding_window": None},
        dropped=frozenset({"layer_types", "max_window_layers"}),
        rules=(SILU, (_no_window, "some layers have a sliding window, which Qwen3-MoE applies to all or none")),
        serves="vLLM, llama.cpp",
        serves_with_biases="vLLM",
        vllm_differs=((lambda c: bool(c.get("attention_bias")), "leaves the bias of attention's output out"),),
        widening=HEADS_ARE_NORMED,
    ),
    Native(
        **_partner("qwen3", "mellum", "MellumForCausalLM"),
        expert_hidden_key="moe_intermediate_size",
        rope_per_layer_type=True,
        fixed=_RENORMALISED,
        dropped=frozenset({"max_window_layers", "use_sliding_window"}),
        serves="vLLM, llama.cpp",
        widening=HEADS_ARE_NORMED,
        rules=(SILU, (lambda c: bool(c["sliding_window"]), "it is needed only for layers with a window, and there is none")),
    ),
    Native(
        **_partner("olmo2", "flex_olmo", "FlexOlmoForCausalLM"),
        without_gguf="its converter does not know FlexOlmo",
        writes_head_dim=False,
        fixed=_RENORMALISED,
        widening=Widening(
            norms=("post_attention_layernorm", "post_feedforward_layernorm"),
            before_attention=None,
            over_heads=("self_attn.q_norm", "self_attn.k_norm"),
            recency=False,
            whole_heads=True,
            in_front=False,
        ),
        rules=(SILU, heads_fill("FlexOlmo")),
    ),
    Native(
        **_partner("hunyuan_v1_dense", "hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM"),
        without_gguf="its converter knows only the tokenizer and the shared expert of the published model",
        router="mlp.gate.wg.weight",
        top_k_key="moe_topk",
        widening=HEADS_ARE_NORMED,
        fixed={"output_router_logits": False},
        constants=_shared("shared_mlp", "F"),
        rules=(SILU,),
    ),
    Native(
        **_partner("qwen3_5_text", "qwen3_5_moe_text", "Qwen3_5MoeForCausalLM"),
        without_gguf="its converter wants the layers that predict further tokens, which a mixture has not",
        expert_hidden_key="moe_intermediate_size",
        fixed={"shared_expert_intermediate_size": 0, "output_router_logits": False},
        constants=(*_shared("shared_expert"), Constant("mlp.shared_expert_gate.weight", ("1", "D"))),
        dropped=frozenset({"full_attention_interval"}),
        widening="its first layers have linear attention, which cannot average over the text",
        rules=(SILU,),
    ),
    Native(
        **_partner("lfm2", "lfm2_moe", "Lfm2MoeForCausalLM"),
        router="feed_forward.gate.weight",
        experts={part: f"feed_forward.experts.{{expert}}.w{n}.weight" for part, n in (("gate", 1), ("up", 3), ("down", 2))},
        router_module="feed_forward.gate",
        block_module="feed_forward",
        expert_hidden_key="moe_intermediate_size",
        by_sigmoids=True,
        fixed={**_RENORMALISED, "num_dense_layers": 0, "use_expert_bias": True, "routed_scaling_factor": 1.0},
        constants=(Constant("feed_forward.expert_bias", ("E",)),),
        serves="llama.cpp",
        widening=NO_ATTENTION,
    ),
    Native(
        **_partner("seed_oss", "glm4_moe", "Glm4MoeForCausalLM"),
        num_experts_key="n_routed_experts",
        expert_hidden_key="moe_intermediate_size",
        by_sigmoids=True,
        fixed={
            **{**_RENORMALISED, "first_k_dense_replace": 0, "n_shared_experts": 0, "routed_scaling_factor": 1.0},
            **{"n_group": 1, "topk_group": 1, "use_qk_norm": False},
        },
        computed={"rope_parameters": lambda c: {**mapping(c, "rope_parameters"), "partial_rotary_factor": 1.0}},
        constants=(Constant("mlp.gate.e_score_correction_bias", ("E",)), *_shared("shared_experts")),
        serves="transformers alone",
        without_gguf="its converter wants a shared expert, which a mixture has not",
        widening="it weighs experts by sigmoids, which evidence that is carried can exceed",
        rules=(
            SILU,
            NO_MLP_BIAS,
            (lambda c: not c.get("attention_out_bias"), "the output of attention has a bias, GLM's has none"),
        ),
    ),
)
