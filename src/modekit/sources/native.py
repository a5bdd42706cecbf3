"""The native MoE architecture that says a family's mixture of whole FFN experts exactly: one row of data each.

A row names where the native architecture keeps experts and router, and how its config follows from the dense one.
`choose_native` returns the first row of a family whose rules all hold, or every reason why none does. A new pair is a
new row; the oracle tests in tests/sources/test_families.py run over `NATIVES`.

What makes a row exact is written in its rules and `fixed` settings: the native block must renormalise the weights of
the chosen experts to one, attention, norms and rotary embedding must be the same code, and every default that differs
between the two configs must be written out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modekit.recipes.recipe import Recipe
from modekit.sources.families import FAMILIES
from modekit.sources.family import Config, Family, whole, words
from modekit.sources.looked_up import LOOKED_UP
from modekit.sources.native_row import Constant, Native, Rule, Widening


def _silu(config: Config) -> bool:
    return config.get("hidden_act", "silu") in {"silu", "swish"}


def _whole_heads(config: Config) -> bool:
    heads = whole(config, "num_attention_heads")
    head_dim = config.get("head_dim")
    return whole(config, "hidden_size") % heads == 0 and head_dim in {None, whole(config, "hidden_size") // heads}


def _one_attention_kind(config: Config) -> bool:
    return len(set(words(config, "layer_types"))) < 2


def _score_scale(config: Config) -> float:
    return float((whole(config, "hidden_size") // whole(config, "num_attention_heads")) ** -0.5)


def _mapping(config: Config, key: str) -> Config:
    found = config[key]
    assert isinstance(found, Mapping)
    return found


def _plain_rope(config: Config) -> bool:
    rope, factor = _mapping(config, "rope_parameters"), config.get("partial_rotary_factor")
    return rope.get("rope_type") != "longrope" and {factor, rope.get("partial_rotary_factor")} <= {None, 1}


def _kinds_of_granite(config: Config) -> list[object]:
    """As llama.cpp's converter and published models call them."""
    named: dict[object, object] = {"linear_attention": "mamba", "full_attention": "attention"}
    return [named.get(kind, kind) for kind in words(config, "layer_types")]


def _no_window(config: Config) -> bool:
    return "sliding_attention" not in words(config, "layer_types")


_NO_MLP_BIAS: Rule = (lambda c: not c.get("mlp_bias"), "the FFN has biases (mlp_bias), the native experts have none")
_SILU: Rule = (_silu, "the activation is not SiLU, which the native architecture's engines assume")

_MIXTRAL: dict[str, Any] = {
    "native_type": "mixtral",
    "native_class": "MixtralForCausalLM",
    "router": "block_sparse_moe.gate.weight",
    "experts": {
        "gate": "block_sparse_moe.experts.{expert}.w1.weight",
        "up": "block_sparse_moe.experts.{expert}.w3.weight",
        "down": "block_sparse_moe.experts.{expert}.w2.weight",
    },
    "num_experts_key": "num_local_experts",
    "fixed": {"output_router_logits": False, "router_jitter_noise": 0.0},
    "dropped": frozenset({"attention_bias", "mlp_bias", "pretraining_tp", "layer_types", "use_sliding_window"}),
    "serves": "vLLM, llama.cpp",
}
_FUSED_IN_GRANITE: dict[str, Any] = {
    "router": "block_sparse_moe.router.layer.weight",
    "experts": None,
    "fused": ("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
    "router_module": "block_sparse_moe.router",
    "block_module": "block_sparse_moe",
    "num_experts_key": "num_local_experts",
    "writes_head_dim": False,
    "serves": "vLLM, llama.cpp",
}
_GRANITE_MOE: dict[str, Any] = {
    **_FUSED_IN_GRANITE,
    "native_type": "granitemoe",
    "native_class": "GraniteMoeForCausalLM",
    "dropped": frozenset({"mlp_bias", "pretraining_tp", "layer_types", "use_sliding_window", "sliding_window"}),
    "vllm_differs": ((lambda c: bool(c.get("attention_bias")), "leaves attention's biases out"),),
    "widening": Widening(whole_heads=True),
}
_NO_ATTENTION = "its first layers have no attention that could average over the text"
_HEADS_ARE_NORMED = Widening(recency=False)
"""Norms of queries and keys with weights that only the model's files know: a constant is no constant behind them."""
_FAMILY = {family.model_type: family for family in (*FAMILIES, *LOOKED_UP)}

NATIVES: tuple[Native, ...] = (
    Native(
        family=_FAMILY["llama"],
        **_MIXTRAL,
        rules=((lambda c: not c.get("attention_bias"), "attention has biases, Mixtral's has none"), _NO_MLP_BIAS, _SILU),
    ),
    Native(
        family=_FAMILY["llama"],
        **_GRANITE_MOE,
        fixed={"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0},
        computed={"attention_multiplier": _score_scale},
        rules=(
            _NO_MLP_BIAS,
            _SILU,
            (_whole_heads, "head_dim is not hidden_size / num_attention_heads, which GraniteMoE assumes"),
        ),
    ),
    Native(
        family=_FAMILY["mistral"],
        **_MIXTRAL,
        rules=(_SILU, (_one_attention_kind, "layers differ in their attention window, Mixtral's are all alike")),
    ),
    Native(
        family=_FAMILY["qwen2"],
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
        rules=(_SILU, (_whole_heads, "head_dim is not hidden_size / num_attention_heads, which Qwen2-MoE assumes")),
    ),
    Native(
        family=_FAMILY["qwen3"],
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
        rules=(_SILU, (_no_window, "some layers have a sliding window, which Qwen3-MoE applies to all or none")),
        serves="vLLM, llama.cpp",
        serves_with_biases="vLLM",
        vllm_differs=((lambda c: bool(c.get("attention_bias")), "leaves the bias of attention's output out"),),
        widening=_HEADS_ARE_NORMED,
    ),
    Native(
        family=_FAMILY["qwen3"],
        native_type="mellum",
        native_class="MellumForCausalLM",
        expert_hidden_key="moe_intermediate_size",
        rope_per_layer_type=True,
        fixed={"norm_topk_prob": True, "output_router_logits": False},
        dropped=frozenset({"max_window_layers", "use_sliding_window"}),
        serves="vLLM, llama.cpp",
        widening=_HEADS_ARE_NORMED,
        rules=(_SILU, (lambda c: bool(c["sliding_window"]), "it is needed only for layers with a window, and there is none")),
    ),
    Native(
        family=_FAMILY["granite"],
        **_GRANITE_MOE,
        rules=(
            _NO_MLP_BIAS,
            _SILU,
            (_whole_heads, "head_dim is not hidden_size / num_attention_heads, which GraniteMoE assumes"),
        ),
    ),
    Native(
        family=_FAMILY["olmo2"],
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
        rules=(_SILU, (_whole_heads, "head_dim is not hidden_size / num_attention_heads, which FlexOlmo assumes")),
    ),
    Native(
        family=_FAMILY["cohere2"],
        native_type="cohere2_moe",
        native_class="Cohere2MoeForCausalLM",
        dropped=frozenset({"sliding_window_pattern"}),
        fixed={"num_shared_experts": 0, "expert_selection_fn": "softmax", "output_router_logits": False},
        serves="vLLM, llama.cpp",
        vllm_differs=(
            (lambda c: "sliding_attention" in words(c, "layer_types"), "attends to one token more than the window has"),
        ),
        widening="its norms subtract the mean of all channels, which channels besides the base's would change",
        rules=(_SILU, (_whole_heads, "head_dim is not hidden_size / num_attention_heads, which Cohere2 assumes")),
    ),
    Native(
        family=_FAMILY["ernie4_5"],
        native_type="ernie4_5_moe",
        native_class="Ernie4_5_MoeForCausalLM",
        num_experts_key="moe_num_experts",
        top_k_key="moe_k",
        expert_hidden_key="moe_intermediate_size",
        fixed={
            "moe_num_shared_experts": 0,
            "moe_layer_start_index": 0,
            "moe_layer_end_index": -1,
            "moe_layer_interval": 1,
            "output_router_logits": False,
        },
        constants=(Constant("mlp.moe_statics.e_score_correction_bias", ("1", "E")),),
        serves="vLLM, llama.cpp",
        widening=Widening(interleaved=True),
        rules=(_SILU, (lambda c: not c.get("use_bias"), "layers have biases (use_bias), the experts' are not copied")),
    ),
    Native(
        family=_FAMILY["hunyuan_v1_dense"],
        native_type="hunyuan_v1_moe",
        native_class="HunYuanMoEV1ForCausalLM",
        without_gguf="its converter knows only the tokenizer and the shared expert of the published model",
        router="mlp.gate.wg.weight",
        top_k_key="moe_topk",
        widening=_HEADS_ARE_NORMED,
        fixed={"output_router_logits": False},
        constants=(
            Constant("mlp.shared_mlp.gate_proj.weight", ("F", "D")),
            Constant("mlp.shared_mlp.up_proj.weight", ("F", "D")),
            Constant("mlp.shared_mlp.down_proj.weight", ("D", "F")),
        ),
        rules=(_SILU,),
    ),
    Native(
        family=_FAMILY["qwen3_5_text"],
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
        rules=(_SILU,),
    ),
    Native(
        family=_FAMILY["granitemoehybrid"],
        native_type="granitemoehybrid",
        native_class="GraniteMoeHybridForCausalLM",
        **{**_FUSED_IN_GRANITE, "serves": "llama.cpp"},
        fixed={"shared_intermediate_size": 0, "output_router_logits": False},
        computed={"layer_types": _kinds_of_granite},
        constants=(
            Constant("shared_mlp.input_linear.weight", ("0", "D")),
            Constant("shared_mlp.output_linear.weight", ("D", "0")),
        ),
        widening=_NO_ATTENTION,
        rules=(
            _SILU,
            (
                lambda c: c.get("intermediate_size") == c.get("shared_intermediate_size"),
                "intermediate_size is not shared_intermediate_size, the width of its FFN",
            ),
        ),
    ),
    Native(
        family=_FAMILY["lfm2"],
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
        widening=_NO_ATTENTION,
    ),
    Native(
        family=_FAMILY["phi3"],
        **_GRANITE_MOE,
        split={"self_attn.qkv_proj": tuple(f"self_attn.{part}_proj" for part in "qkv")},
        fixed={"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0},
        computed={"attention_multiplier": _score_scale},
        rules=(
            _SILU,
            (_whole_heads, "head_dim is not hidden_size / num_attention_heads, which GraniteMoE assumes"),
            (lambda c: not c["sliding_window"], "it has a sliding window, GraniteMoE has none"),
            (_plain_rope, "its rotary embedding is partial or longrope, GraniteMoE's is neither"),
        ),
    ),
    Native(
        family=_FAMILY["seed_oss"],
        native_type="glm4_moe",
        native_class="Glm4MoeForCausalLM",
        num_experts_key="n_routed_experts",
        expert_hidden_key="moe_intermediate_size",
        by_sigmoids=True,
        fixed={
            **{"norm_topk_prob": True, "first_k_dense_replace": 0, "n_shared_experts": 0, "routed_scaling_factor": 1.0},
            **{"n_group": 1, "topk_group": 1, "use_qk_norm": False, "output_router_logits": False},
        },
        computed={"rope_parameters": lambda c: {**_mapping(c, "rope_parameters"), "partial_rotary_factor": 1.0}},
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
            _SILU,
            _NO_MLP_BIAS,
            (lambda c: not c.get("attention_out_bias"), "the output of attention has a bias, GLM's has none"),
        ),
    ),
)


def choose_native(family: Family, config: Config, recipe: Recipe | None = None) -> tuple[Native | None, list[str]]:
    """The first row that says a mixture of this dense config exactly, or None and the reason of every row tried.

    Without a recipe, of some mixture.
    """
    tried = []
    for row in NATIVES:
        if row.family.model_type == family.model_type and row.family.is_variant(config):
            refusals = row.refusals(config) or ([] if recipe is None else row.beyond(recipe))
            if not refusals:
                return row, []
            tried.append(f"{row.native_type}: {'; '.join(refusals)}")
    reason = _WITHOUT_PARTNER.get(family.model_type, "nobody has written one")
    return None, tried or [f"no native architecture says a mixture of '{family.model_type}': {reason}"]


def leaves_out(config: Config) -> bool:
    """Whether a native config is one whose tensors without a number are left out, so that transformers misses them."""
    return any(
        row.native_type == config.get("model_type")
        and row.empty_names(1)
        and all(config.get(key) == value for key, value in row.fixed.items() if value == 0 and value is not False)
        for row in NATIVES
    )


def native_of(native_type: str, model_type: str) -> Native:
    """The row of a finished checkpoint. Raises StopIteration when there is none."""
    return next(row for row in NATIVES if (row.native_type, row.family.model_type) == (native_type, model_type))


_WITHOUT_PARTNER = {
    "m2m_100": "NLLB-MoE in transformers runs no more than its first two experts",
    "t5": "Switch Transformers multiply what an expert says by its router's probability, which is never 1",
    "gemma": "GeGLU experts",
    "gemma2": "GeGLU experts and sandwich norms",
    "gemma3_text": "GeGLU experts and sandwich norms",
    "gemma4_text": "GeGLU experts and sandwich norms",
    "ministral3": "queries that grow with their position",
    "olmo3": "a window that differs between layers",
    "smollm3": "layers without rotary embedding",
    "exaone4": "norms after the block",
    "glm4": "four norms per layer and interleaved partial rotary embedding",
    "starcoder2": "an FFN without a gate",
}
