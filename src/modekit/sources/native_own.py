"""Rows of families with a partner that no other has: most often the mixture of experts of the same series."""

from __future__ import annotations

from modekit.sources.family import Config, words
from modekit.sources.native_row import Constant, Native, Widening
from modekit.sources.native_rules import FAMILY, HEADS_ARE_NORMED, NO_ATTENTION, NO_MLP_BIAS, SILU, mapping, whole_heads


def _no_window(config: Config) -> bool:
    return "sliding_attention" not in words(config, "layer_types")


IN_THEIR_OWN: tuple[Native, ...] = (
    Native(
        family=FAMILY["qwen2"],
        native_type="qwen2_moe",
        native_class="Qwen2MoeForCausalLM",
        expert_hidden_key="moe_intermediate_size",
        fixed={
            "norm_topk_prob": True,
            "qkv_bias": True,
            "shared_expert_intermediate_size": 0,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "output_router_logits": False,
        },
        constants=(
            Constant("mlp.shared_expert.gate_proj.weight", ("0", "D")),
            Constant("mlp.shared_expert.up_proj.weight", ("0", "D")),
            Constant("mlp.shared_expert.down_proj.weight", ("D", "0")),
            Constant("mlp.shared_expert_gate.weight", ("1", "D")),
        ),
        serves="vLLM; llama.cpp as a Mixtral with biases (modekit export --gguf)",
        widening=Widening(whole_heads=True),
        rules=(SILU, (whole_heads, "head_dim is not hidden_size / num_attention_heads, which Qwen2-MoE assumes")),
    ),
    Native(
        family=FAMILY["qwen3"],
        native_type="qwen3_moe",
        native_class="Qwen3MoeForCausalLM",
        expert_hidden_key="moe_intermediate_size",
        fixed={
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "output_router_logits": False,
            "use_sliding_window": False,
            "sliding_window": None,
        },
        dropped=frozenset({"layer_types", "max_window_layers"}),
        rules=(SILU, (_no_window, "some layers have a sliding window, which Qwen3-MoE applies to all or none")),
        serves="vLLM, llama.cpp",
        serves_with_biases="vLLM",
        vllm_differs=((lambda c: bool(c.get("attention_bias")), "leaves the bias of attention's output out"),),
        widening=HEADS_ARE_NORMED,
    ),
    Native(
        family=FAMILY["qwen3"],
        native_type="mellum",
        native_class="MellumForCausalLM",
        expert_hidden_key="moe_intermediate_size",
        rope_per_layer_type=True,
        fixed={"norm_topk_prob": True, "output_router_logits": False},
        dropped=frozenset({"max_window_layers", "use_sliding_window"}),
        serves="vLLM, llama.cpp",
        widening=HEADS_ARE_NORMED,
        rules=(SILU, (lambda c: bool(c["sliding_window"]), "it is needed only for layers with a window, and there is none")),
    ),
    Native(
        family=FAMILY["olmo2"],
        native_type="flex_olmo",
        native_class="FlexOlmoForCausalLM",
        without_gguf="its converter does not know FlexOlmo",
        writes_head_dim=False,
        fixed={"norm_topk_prob": True, "output_router_logits": False},
        widening=Widening(
            norms=("post_attention_layernorm", "post_feedforward_layernorm"),
            before_attention=None,
            over_heads=("self_attn.q_norm", "self_attn.k_norm"),
            recency=False,
            whole_heads=True,
            in_front=False,
        ),
        rules=(SILU, (whole_heads, "head_dim is not hidden_size / num_attention_heads, which FlexOlmo assumes")),
    ),
    Native(
        family=FAMILY["hunyuan_v1_dense"],
        native_type="hunyuan_v1_moe",
        native_class="HunYuanMoEV1ForCausalLM",
        without_gguf="its converter knows only the tokenizer and the shared expert of the published model",
        router="mlp.gate.wg.weight",
        top_k_key="moe_topk",
        widening=HEADS_ARE_NORMED,
        fixed={"output_router_logits": False},
        constants=(
            Constant("mlp.shared_mlp.gate_proj.weight", ("F", "D")),
            Constant("mlp.shared_mlp.up_proj.weight", ("F", "D")),
            Constant("mlp.shared_mlp.down_proj.weight", ("D", "F")),
        ),
        rules=(SILU,),
    ),
    Native(
        family=FAMILY["qwen3_5_text"],
        native_type="qwen3_5_moe_text",
        native_class="Qwen3_5MoeForCausalLM",
        without_gguf="its converter wants the layers that predict further tokens, which a mixture has not",
        expert_hidden_key="moe_intermediate_size",
        fixed={"shared_expert_intermediate_size": 0, "output_router_logits": False},
        constants=(
            Constant("mlp.shared_expert.gate_proj.weight", ("0", "D")),
            Constant("mlp.shared_expert.up_proj.weight", ("0", "D")),
            Constant("mlp.shared_expert.down_proj.weight", ("D", "0")),
            Constant("mlp.shared_expert_gate.weight", ("1", "D")),
        ),
        dropped=frozenset({"full_attention_interval"}),
        widening="its first layers have linear attention, which cannot average over the text",
        rules=(SILU,),
    ),
    Native(
        family=FAMILY["lfm2"],
        native_type="lfm2_moe",
        native_class="Lfm2MoeForCausalLM",
        router="feed_forward.gate.weight",
        experts={part: f"feed_forward.experts.{{expert}}.w{n}.weight" for part, n in (("gate", 1), ("up", 3), ("down", 2))},
        router_module="feed_forward.gate",
        block_module="feed_forward",
        expert_hidden_key="moe_intermediate_size",
        by_sigmoids=True,
        fixed={
            **{"norm_topk_prob": True, "num_dense_layers": 0, "use_expert_bias": True, "routed_scaling_factor": 1.0},
            "output_router_logits": False,
        },
        constants=(Constant("feed_forward.expert_bias", ("E",)),),
        serves="llama.cpp",
        widening=NO_ATTENTION,
    ),
    Native(
        family=FAMILY["seed_oss"],
        native_type="glm4_moe",
        native_class="Glm4MoeForCausalLM",
        num_experts_key="n_routed_experts",
        expert_hidden_key="moe_intermediate_size",
        by_sigmoids=True,
        fixed={
            **{"norm_topk_prob": True, "first_k_dense_replace": 0, "n_shared_experts": 0, "routed_scaling_factor": 1.0},
            **{"n_group": 1, "topk_group": 1, "use_qk_norm": False, "output_router_logits": False},
        },
        computed={"rope_parameters": lambda c: {**mapping(c, "rope_parameters"), "partial_rotary_factor": 1.0}},
        constants=(
            Constant("mlp.gate.e_score_correction_bias", ("E",)),
            Constant("mlp.shared_experts.gate_proj.weight", ("0", "D")),
            Constant("mlp.shared_experts.up_proj.weight", ("0", "D")),
            Constant("mlp.shared_experts.down_proj.weight", ("D", "0")),
        ),
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
