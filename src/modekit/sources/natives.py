"""The native MoE architecture that says a family's mixture of whole FFN experts exactly: one row of data each.

A row names where the native architecture keeps experts and router, and how its config follows from the dense one.
`choose_native` returns the first row of a family whose rules all hold, or every reason why none does. A new pair is a
new row; the oracle tests in tests/sources/test_families.py run over `NATIVES`.

What makes a row exact is written in its rules and `fixed` settings: the native block must renormalise the weights of
the chosen experts to one, attention, norms and rotary embedding must be the same code, and every default that differs
between the two configs must be written out.
"""

from __future__ import annotations

from typing import Any

from modekit.sources.config import Config, whole, words
from modekit.sources.families import DECODERS
from modekit.sources.family import Family
from modekit.sources.native import Constant, Native, Rule, Widening, experts_in
from modekit.sources.routed import FUSED_IN_GRANITE, ROUTED, WHY_NOT


def heads_fill(native: str) -> Rule:
    """Heads are as wide as the stream has room for, which a native architecture assumes."""

    def holds(config: Config) -> bool:
        hidden, heads = whole(config, "hidden_size"), whole(config, "num_attention_heads")
        return hidden % heads == 0 and config.get("head_dim") in {None, hidden // heads}

    return holds, f"head_dim is not hidden_size / num_attention_heads, which {native} assumes"


_ROWS = {family.model_type: family for family in DECODERS}


def _row(model_type: str, native_type: str, native_class: str, **says: Any) -> Native:
    return Native(_ROWS[model_type], native_type, native_class, **says)


def _shared(module: str, hidden: str = "0") -> tuple[Constant, ...]:
    """An expert that all tokens have, and that adds nothing."""
    shapes = {"gate": (hidden, "D"), "up": (hidden, "D"), "down": ("D", hidden)}
    return tuple(Constant(f"mlp.{module}.{part}_proj.weight", shape) for part, shape in shapes.items())


_NO_MLP_BIAS: Rule = (lambda c: not c.get("mlp_bias"), "the FFN has biases (mlp_bias), the native experts have none")
_NO_BIASES: Rule = (lambda c: not c.get("attention_bias"), "attention has biases, those of the native architecture have none")
_SILU: Rule = (
    lambda c: c.get("hidden_act", "silu") in {"silu", "swish"},
    "the activation is not SiLU, which the native architecture's engines assume",
)
_ONE_WINDOW: Rule = (
    lambda c: len(set(words(c, "layer_types"))) < 2,
    "layers differ in their attention window, Mixtral's are all alike",
)
_HEADS_ARE_NORMED = Widening(recency=False)
"""Norms of queries and keys with weights that only the model's files know: a constant is no constant behind them."""
_RENORMALISED = {"norm_topk_prob": True, "output_router_logits": False}
_IN_EVERY_LAYER: Config = {"decoder_sparse_step": 1, "mlp_only_layers": []}
_NO_FACTORS = {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0}
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
_GRANITE_MOE: dict[str, Any] = {
    **FUSED_IN_GRANITE,
    "native_type": "granitemoe",
    "native_class": "GraniteMoeForCausalLM",
    "dropped": frozenset({"mlp_bias", "pretraining_tp", "layer_types", "use_sliding_window", "sliding_window"}),
    "vllm_differs": ((lambda c: bool(c.get("attention_bias")), "leaves attention's biases out"),),
    "widening": Widening(whole_heads=True),
}

NATIVES: tuple[Native, ...] = (
    Native(_ROWS["llama"], **_MIXTRAL, rules=(_NO_BIASES, _NO_MLP_BIAS, _SILU)),
    Native(
        _ROWS["llama"],
        **_GRANITE_MOE,
        fixed=_NO_FACTORS,
        computed={"attention_multiplier": lambda c: (whole(c, "hidden_size") // whole(c, "num_attention_heads")) ** -0.5},
        rules=(_NO_MLP_BIAS, _SILU, heads_fill("GraniteMoE")),
    ),
    Native(_ROWS["mistral"], **_MIXTRAL, rules=(_SILU, _ONE_WINDOW)),
    Native(_ROWS["granite"], **_GRANITE_MOE, rules=(_NO_MLP_BIAS, _SILU, heads_fill("GraniteMoE"))),
    _row(
        *("cohere2", "cohere2_moe", "Cohere2MoeForCausalLM"),
        fixed={"num_shared_experts": 0, "expert_selection_fn": "softmax", "output_router_logits": False},
        dropped=frozenset({"sliding_window_pattern"}),
        serves="vLLM, llama.cpp",
        widening="its norms subtract the mean of all channels, which channels besides the base's would change",
        vllm_differs=(
            (lambda c: "sliding_attention" in words(c, "layer_types"), "attends to one token more than the window has"),
        ),
        rules=(_SILU, heads_fill("Cohere2")),
    ),
    _row(
        *("ernie4_5", "ernie4_5_moe", "Ernie4_5_MoeForCausalLM"),
        num_experts_key="moe_num_experts",
        top_k_key="moe_k",
        expert_hidden_key="moe_intermediate_size",
        fixed={
            **{"moe_num_shared_experts": 0, "moe_layer_start_index": 0, "moe_layer_end_index": -1, "moe_layer_interval": 1},
            "output_router_logits": False,
        },
        constants=(Constant("mlp.moe_statics.e_score_correction_bias", ("1", "E")),),
        serves="vLLM, llama.cpp",
        widening=Widening(interleaved=True),
        rules=(_SILU, (lambda c: not c.get("use_bias"), "layers have biases (use_bias), the experts' are not copied")),
    ),
    _row(
        *("qwen2", "qwen2_moe", "Qwen2MoeForCausalLM"),
        expert_hidden_key="moe_intermediate_size",
        fixed={**_RENORMALISED, **_IN_EVERY_LAYER, "qkv_bias": True, "shared_expert_intermediate_size": 0},
        constants=(*_shared("shared_expert"), Constant("mlp.shared_expert_gate.weight", ("1", "D"))),
        serves="vLLM; llama.cpp as a Mixtral with biases (modekit export --gguf)",
        widening=Widening(whole_heads=True),
        rules=(_SILU, heads_fill("Qwen2-MoE")),
    ),
    _row(
        *("qwen3", "qwen3_moe", "Qwen3MoeForCausalLM"),
        expert_hidden_key="moe_intermediate_size",
        fixed={**_RENORMALISED, **_IN_EVERY_LAYER, "use_sliding_window": False, "sliding_window": None},
        dropped=frozenset({"layer_types", "max_window_layers"}),
        rules=(
            _SILU,
            (
                lambda c: "sliding_attention" not in words(c, "layer_types"),
                "some layers have a sliding window, which Qwen3-MoE applies to all or none",
            ),
        ),
        serves="vLLM, llama.cpp",
        serves_with_biases="vLLM",
        vllm_differs=((lambda c: bool(c.get("attention_bias")), "leaves the bias of attention's output out"),),
        widening=_HEADS_ARE_NORMED,
    ),
    _row(
        *("olmo2", "flex_olmo", "FlexOlmoForCausalLM"),
        without_gguf="its converter does not know FlexOlmo",
        writes_head_dim=False,
        fixed=_RENORMALISED,
        widening="a norm behind attention makes all that it adds one size",
        rules=(_SILU, heads_fill("FlexOlmo")),
    ),
    _row(
        *("hunyuan_v1_dense", "hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM"),
        without_gguf="its converter knows only the tokenizer and the shared expert of the published model",
        router="mlp.gate.wg.weight",
        top_k_key="moe_topk",
        widening=_HEADS_ARE_NORMED,
        fixed={"output_router_logits": False},
        constants=_shared("shared_mlp", "F"),
        rules=(_SILU,),
    ),
    _row(
        *("qwen3_5_text", "qwen3_5_moe_text", "Qwen3_5MoeForCausalLM"),
        without_gguf="its converter wants the layers that predict further tokens, which a mixture has not",
        expert_hidden_key="moe_intermediate_size",
        fixed={"shared_expert_intermediate_size": 0, "output_router_logits": False},
        constants=(*_shared("shared_expert"), Constant("mlp.shared_expert_gate.weight", ("1", "D"))),
        dropped=frozenset({"full_attention_interval"}),
        widening="its first layers have linear attention, which cannot average over the text",
        rules=(_SILU,),
    ),
)


def choose_native(family: Family, config: Config) -> tuple[Native | None, list[str]]:
    """The first row that says a mixture of this dense config exactly, or None and the reason of every row tried."""
    tried = []
    for row in (*NATIVES, *ROUTED):
        if row.family.model_type == family.model_type and row.family.is_variant(config):
            refusals = row.refusals(config)
            if not refusals:
                return row, []
            tried.append(f"{row.native_type}: {'; '.join(refusals)}")
    why = WHY_NOT.get(family.model_type, f"no native architecture holds a mixture of '{family.model_type}'")
    return None, tried or [f"{why} (benchmarks/partners.md)"]


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
    return next(row for row in (*NATIVES, *ROUTED) if (row.native_type, row.family.model_type) == (native_type, model_type))
