"""Rows of families whose partner several dense families share: Mixtral, the classes of GraniteMoE and what is like them."""

from __future__ import annotations

from typing import Any

from modekit.sources.family import Config, whole, words
from modekit.sources.native_row import (
    FAMILY,
    NO_ATTENTION,
    NO_MLP_BIAS,
    SILU,
    Constant,
    Native,
    Rule,
    Widening,
    experts_in,
    heads_fill,
    mapping,
)


def _score_scale(config: Config) -> float:
    return float((whole(config, "hidden_size") // whole(config, "num_attention_heads")) ** -0.5)


def _plain_rope(config: Config) -> bool:
    rope, factor = mapping(config, "rope_parameters"), config.get("partial_rotary_factor")
    return rope.get("rope_type") != "longrope" and all(
        each in (None, 1) for each in (factor, rope.get("partial_rotary_factor"))
    )


def _window_of_all(config: Config) -> object:
    """Ministral's window, where its layers have one."""
    return config["sliding_window"] if "sliding_attention" in words(config, "layer_types") else None


def _turns_alike(config: Config) -> list[object]:
    """Rotary theta of each layer, where all have one."""
    return [mapping(config, "rope_parameters")["rope_theta"]] * whole(config, "num_hidden_layers")


def _turns_of_smollm(config: Config) -> list[object]:
    """Rotary theta of each layer, 0 in those without rotary embedding: `no_rope_layers` has a 1 for those with it."""
    thetas, every = _turns_alike(config), whole(config, "no_rope_layer_interval")
    turned = words(config, "no_rope_layers") or [(layer + 1) % every for layer in range(len(thetas))]
    return [theta if turns else 0 for theta, turns in zip(thetas, turned, strict=False)]


def _kinds_of_smollm(config: Config) -> list[object]:
    """The window, where there is one, in layers without rotary embedding."""
    most = "sliding_attention" if config["sliding_window"] else "full_attention"
    named = words(config, "layer_types") or [most if not theta else "full_attention" for theta in _turns_of_smollm(config)]
    return named if config["sliding_window"] else ["full_attention"] * len(named)


def _kinds_of_granite(config: Config) -> list[object]:
    """As llama.cpp's converter and published models call them."""
    named: dict[object, object] = {"linear_attention": "mamba", "full_attention": "attention"}
    return [named.get(kind, kind) for kind in words(config, "layer_types")]


_MIXTRAL: dict[str, Any] = {
    "native_type": "mixtral",
    "native_class": "MixtralForCausalLM",
    "router": "block_sparse_moe.gate.weight",
    "experts": experts_in("block_sparse_moe", "w1", "w3", "w2"),
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
_ERNIE: dict[str, Any] = {
    "native_type": "ernie4_5_moe",
    "native_class": "Ernie4_5_MoeForCausalLM",
    "num_experts_key": "moe_num_experts",
    "top_k_key": "moe_k",
    "expert_hidden_key": "moe_intermediate_size",
    "fixed": {
        "moe_num_shared_experts": 0,
        "moe_layer_start_index": 0,
        "moe_layer_end_index": -1,
        "moe_layer_interval": 1,
        "output_router_logits": False,
    },
    "constants": (Constant("mlp.moe_statics.e_score_correction_bias", ("1", "E")),),
    "serves": "vLLM, llama.cpp",
    "widening": Widening(interleaved=True),
}
_COHERE: dict[str, Any] = {
    "native_type": "cohere2_moe",
    "native_class": "Cohere2MoeForCausalLM",
    "fixed": {"num_shared_experts": 0, "expert_selection_fn": "softmax", "output_router_logits": False},
    "widening": "its norms subtract the mean of all channels, which channels besides the base's would change",
}
_GRANITE_SWA: dict[str, Any] = {
    "native_type": "granitemoe_swa",
    "native_class": "GraniteMoeSWAForCausalLM",
    "router": "block_sparse_moe.router.weight",
    "experts": None,
    "fused": ("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"),
    "router_module": "block_sparse_moe.router",
    "block_module": "block_sparse_moe",
    "num_experts_key": "num_local_experts",
    "writes_head_dim": False,
    "serves": "transformers alone",
    "without_gguf": "its converter does not know GraniteMoeSWA",
    "widening": "its heads have sinks, which the heads of a router's own would need, too",
    "rules": (NO_MLP_BIAS, SILU, heads_fill("GraniteMoeSWA")),
}
_ONE_WINDOW: Rule = (
    lambda c: len(set(words(c, "layer_types"))) < 2,
    "layers differ in their attention window, Mixtral's are all alike",
)
_LONGER_THAN_TEXT = 2**30  # tokens: where Cohere2 has a window, it turns queries and keys
_NO_BIASES: Rule = (lambda c: not c.get("attention_bias"), "attention has biases, those of the native architecture have none")
IN_SHARED: tuple[Native, ...] = (
    Native(family=FAMILY["llama"], **_MIXTRAL, rules=(_NO_BIASES, NO_MLP_BIAS, SILU)),
    *(
        Native(
            family=FAMILY[model_type],
            **{**_MIXTRAL, "dropped": _MIXTRAL["dropped"] | set(FAMILY[model_type].same_as.values())},
            rules=(_NO_BIASES, NO_MLP_BIAS, SILU),
        )
        for model_type in ("exaone", "internlm3", "iquestcoder")
    ),
    Native(
        family=FAMILY["llama"],
        **_GRANITE_MOE,
        fixed={"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0},
        computed={"attention_multiplier": _score_scale},
        rules=(NO_MLP_BIAS, SILU, heads_fill("GraniteMoE")),
    ),
    Native(family=FAMILY["mistral"], **_MIXTRAL, rules=(SILU, _ONE_WINDOW)),
    Native(family=FAMILY["ministral"], **_MIXTRAL, computed={"sliding_window": _window_of_all}, rules=(SILU, _ONE_WINDOW)),
    Native(family=FAMILY["granite"], **_GRANITE_MOE, rules=(NO_MLP_BIAS, SILU, heads_fill("GraniteMoE"))),
    Native(
        family=FAMILY["cohere2"],
        **_COHERE,
        dropped=frozenset({"sliding_window_pattern"}),
        serves="vLLM, llama.cpp",
        vllm_differs=(
            (lambda c: "sliding_attention" in words(c, "layer_types"), "attends to one token more than the window has"),
        ),
        rules=(SILU, heads_fill("Cohere2")),
    ),
    Native(
        family=FAMILY["ernie4_5"],
        **_ERNIE,
        rules=(SILU, (lambda c: not c.get("use_bias"), "layers have biases (use_bias), the experts' are not copied")),
    ),
    Native(
        family=FAMILY["helium"],
        **{
            **{**_ERNIE, "widening": Widening(interleaved=True, whole_heads=True)},
            "fixed": {**_ERNIE["fixed"], "use_bias": False},
        },
        dropped=frozenset({"attention_bias", "mlp_bias", "attention_dropout"}),
        rules=(SILU, _NO_BIASES, NO_MLP_BIAS),
    ),
    Native(
        family=FAMILY["cohere"],
        **_COHERE,
        computed={
            "layer_types": lambda c: ["sliding_attention"] * whole(c, "num_hidden_layers"),
            "sliding_window": lambda _: _LONGER_THAN_TEXT,
        },
        dropped=frozenset({"use_qk_norm"}),
        serves="transformers alone",
        without_gguf="it gives a window, and so a rotary embedding, to three layers of four, and these are all alike",
        rules=(
            SILU,
            heads_fill("Cohere2"),
            (lambda c: not c.get("use_qk_norm"), "queries and keys are normed (use_qk_norm), Cohere2's are not"),
        ),
    ),
    Native(
        family=FAMILY["granite_swa"],
        **_GRANITE_SWA,
        computed={"layer_rope_theta": lambda c: c.get("layer_rope_theta") or _turns_alike(c)},
    ),
    Native(
        family=FAMILY["smollm3"],
        **_GRANITE_SWA,
        fixed={"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0},
        computed={
            "attention_multiplier": _score_scale,
            "layer_rope_theta": _turns_of_smollm,
            "layer_types": _kinds_of_smollm,
            "sliding_window": lambda c: c["sliding_window"] or 128,
        },
        dropped=frozenset({"no_rope_layers", "no_rope_layer_interval", "use_sliding_window", "pretraining_tp"}),
        constants=(Constant("self_attn.sinks", ("H",), -10_000.0),),
    ),
    Native(
        family=FAMILY["granitemoehybrid"],
        native_type="granitemoehybrid",
        native_class="GraniteMoeHybridForCausalLM",
        **{**_FUSED_IN_GRANITE, "serves": "llama.cpp"},
        fixed={"shared_intermediate_size": 0, "output_router_logits": False},
        computed={"layer_types": _kinds_of_granite},
        constants=(
            Constant("shared_mlp.input_linear.weight", ("0", "D")),
            Constant("shared_mlp.output_linear.weight", ("D", "0")),
        ),
        widening=NO_ATTENTION,
        rules=(
            SILU,
            (
                lambda c: c.get("intermediate_size") == c.get("shared_intermediate_size"),
                "intermediate_size is not shared_intermediate_size, the width of its FFN",
            ),
        ),
    ),
    Native(
        family=FAMILY["phi3"],
        **_GRANITE_MOE,
        split={"self_attn.qkv_proj": tuple(f"self_attn.{part}_proj" for part in "qkv")},
        fixed={"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0},
        computed={"attention_multiplier": _score_scale},
        rules=(
            SILU,
            heads_fill("GraniteMoE"),
            (lambda c: not c["sliding_window"], "it has a sliding window, GraniteMoE has none"),
            (_plain_rope, "its rotary embedding is partial or longrope, GraniteMoE's is neither"),
        ),
    ),
)
