"""The native MoE architecture that says a family's mixture of whole FFN experts exactly: one row of data each.

A row names where the native architecture keeps experts and router, and how its config follows from the dense one.
`choose_native` returns the first row of a family whose rules all hold, or every reason why none does. A new pair is a
new row; the oracle tests in tests/sources/test_families.py run over `NATIVES`.

`ROUTED` are bases that are mixtures themselves, and whose fine-tunes fit into one plain mixture of the same family: N models
with M experts each become N x M experts, and a token's top k all come from one (planning/routed.py). Their families are here
alone: in the modekit architecture their class says all (structure.py).

What makes a row exact is written in its rules and `fixed` settings: the native block must renormalise the weights of
the chosen experts to one, attention, norms and rotary embedding must be the same code, and every default that differs
between the two configs must be written out.
"""

from __future__ import annotations

from typing import Any

from modekit.sources.config import Config, whole, words
from modekit.sources.families import DECODERS
from modekit.sources.family import Family
from modekit.sources.native import Constant, Native, Routed, Rule, Widening, experts_in
from modekit.sources.stack import LINEAR, Stack


def heads_fill(native: str) -> Rule:
    """Heads are as wide as the stream has room for, which a native architecture assumes."""
    return (
        lambda c: whole(c, "hidden_size") == whole(c, "head_dim") * whole(c, "num_attention_heads"),
        f"head_dim is not hidden_size / num_attention_heads, which {native} assumes",
    )


_ROWS = {family.model_type: family for family in DECODERS}


_NO_MLP_BIAS: Rule = (lambda c: not c.get("mlp_bias"), "the FFN has biases (mlp_bias), the native experts have none")
_NO_BIASES: Rule = (lambda c: not c.get("attention_bias"), "attention has biases, those of the native architecture have none")
_SILU: Rule = (
    lambda c: c.get("hidden_act", "silu") in {"silu", "swish"},
    "the activation is not SiLU, which the native architecture's engines assume",
)
_ONE_WINDOW: Rule = (
    lambda c: len(set(words(c, "layer_types"))) < 2,
    "layers differ in their attention window, those of the mixture are all alike",
)
_HEADS_ARE_NORMED = Widening(recency=False)
"""Norms of queries and keys with weights that only the model's files know: a constant is no constant behind them."""
_QUIET = {"output_router_logits": False}
_RENORMALISED = {"norm_topk_prob": True, **_QUIET}
_IN_EVERY_LAYER: Config = {"decoder_sparse_step": 1, "mlp_only_layers": []}
_NO_FACTORS = {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0}
_MIXTRAL: dict[str, Any] = {
    "native_type": "mixtral",
    "native_class": "MixtralForCausalLM",
    "router": "block_sparse_moe.gate.weight",
    "experts": experts_in("block_sparse_moe", "w1", "w3", "w2"),
    "num_experts_key": "num_local_experts",
    "serves": "vLLM, llama.cpp",
}
_WITHOUT_SHARED: dict[str, Any] = {
    "constants": (Constant("mlp.shared_expert_gate.weight", ("1", "D")),),
    "empty": tuple(f"mlp.shared_expert.{part}_proj.weight" for part in ("gate", "up", "down")),
}
"""Of an expert that all tokens have: none."""
_OF_LLAMA: dict[str, Any] = {
    **_MIXTRAL,
    "fixed": {"output_router_logits": False, "router_jitter_noise": 0.0},
    "dropped": frozenset({"attention_bias", "mlp_bias", "pretraining_tp", "layer_types", "use_sliding_window"}),
}
_QWEN2_MOE: dict[str, Any] = {
    "native_type": "qwen2_moe",
    "native_class": "Qwen2MoeForCausalLM",
    "width_key": "moe_intermediate_size",
    "widening": Widening(whole_heads=True),
}
_QWEN3_MOE: dict[str, Any] = {
    "native_type": "qwen3_moe",
    "native_class": "Qwen3MoeForCausalLM",
    "width_key": "moe_intermediate_size",
    "serves": "vLLM, llama.cpp",
    "widening": _HEADS_ARE_NORMED,
}
_GRANITE_MOE: dict[str, Any] = {
    "native_type": "granitemoe",
    "native_class": "GraniteMoeForCausalLM",
    "router": "block_sparse_moe.router.layer.weight",
    "experts": None,
    "fused": ("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
    "router_module": "block_sparse_moe.router",
    "block_module": "block_sparse_moe",
    "num_experts_key": "num_local_experts",
    "writes_head_dim": False,
    "serves": "vLLM, llama.cpp",
    "widening": Widening(whole_heads=True),
}
_OF_GRANITE: dict[str, Any] = {
    **_GRANITE_MOE,
    "dropped": frozenset({"mlp_bias", "pretraining_tp", "layer_types", "use_sliding_window", "sliding_window"}),
    "vllm_differs": ((lambda c: bool(c.get("attention_bias")), "leaves attention's biases out"),),
}

NATIVES: tuple[Native, ...] = (
    Native(_ROWS["llama"], **_OF_LLAMA, rules=(_NO_BIASES, _NO_MLP_BIAS, _SILU)),
    Native(
        _ROWS["llama"],
        **_OF_GRANITE,
        fixed=_NO_FACTORS,
        computed={"attention_multiplier": lambda c: (whole(c, "hidden_size") // whole(c, "num_attention_heads")) ** -0.5},
        rules=(_NO_MLP_BIAS, _SILU, heads_fill("GraniteMoE")),
    ),
    Native(_ROWS["mistral"], **_OF_LLAMA, rules=(_SILU, _ONE_WINDOW)),
    Native(_ROWS["granite"], **_OF_GRANITE, rules=(_NO_MLP_BIAS, _SILU, heads_fill("GraniteMoE"))),
    Native(
        _ROWS["cohere2"],
        "cohere2_moe",
        "Cohere2MoeForCausalLM",
        fixed={"num_shared_experts": 0, "expert_selection_fn": "softmax", "output_router_logits": False},
        dropped=frozenset({"sliding_window_pattern"}),
        serves="vLLM, llama.cpp",
        widening="its norms subtract the mean of all channels, which channels besides the base's would change",
        vllm_differs=(
            (lambda c: "sliding_attention" in words(c, "layer_types"), "attends to one token more than the window has"),
        ),
        rules=(_SILU, heads_fill("Cohere2")),
    ),
    Native(
        _ROWS["ernie4_5"],
        "ernie4_5_moe",
        "Ernie4_5_MoeForCausalLM",
        num_experts_key="moe_num_experts",
        top_k_key="moe_k",
        width_key="moe_intermediate_size",
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
        _ROWS["qwen2"],
        **_QWEN2_MOE,
        fixed={**_RENORMALISED, **_IN_EVERY_LAYER, "qkv_bias": True, "shared_expert_intermediate_size": 0},
        **_WITHOUT_SHARED,
        serves="vLLM; llama.cpp as a Mixtral with biases (modekit export --gguf)",
        rules=(_SILU, heads_fill("Qwen2-MoE")),
    ),
    Native(
        _ROWS["qwen3"],
        **_QWEN3_MOE,
        fixed={**_RENORMALISED, **_IN_EVERY_LAYER, "use_sliding_window": False, "sliding_window": None},
        dropped=frozenset({"layer_types", "max_window_layers"}),
        rules=(
            _SILU,
            (
                lambda c: "sliding_attention" not in words(c, "layer_types"),
                "some layers have a sliding window, which Qwen3-MoE applies to all or none",
            ),
        ),
        gguf_differs=((lambda c: bool(c.get("attention_bias")), "its qwen3moe has no biases in attention"),),
        vllm_differs=((lambda c: bool(c.get("attention_bias")), "leaves the bias of attention's output out"),),
    ),
    Native(
        _ROWS["olmo2"],
        "flex_olmo",
        "FlexOlmoForCausalLM",
        without_gguf="its converter does not know FlexOlmo",
        writes_head_dim=False,
        fixed=_RENORMALISED,
        widening="a norm behind attention makes all that it adds one size",
        rules=(_SILU, heads_fill("FlexOlmo")),
    ),
    Native(
        _ROWS["hunyuan_v1_dense"],
        "hunyuan_v1_moe",
        "HunYuanMoEV1ForCausalLM",
        without_gguf="its converter knows only the tokenizer and the shared expert of the published model",
        router="mlp.gate.wg.weight",
        top_k_key="moe_topk",
        widening=_HEADS_ARE_NORMED,
        fixed=_QUIET,
        constants=(
            *(Constant(f"mlp.shared_mlp.{part}_proj.weight", ("F", "D")) for part in ("gate", "up")),
            Constant("mlp.shared_mlp.down_proj.weight", ("D", "F")),
        ),
        rules=(_SILU,),
    ),
    Native(
        _ROWS["qwen3_5_text"],
        "qwen3_5_moe_text",
        "Qwen3_5MoeForCausalLM",
        without_gguf="its converter wants the layers that predict further tokens, which a mixture has not",
        width_key="moe_intermediate_size",
        fixed={"shared_expert_intermediate_size": 0, "output_router_logits": False},
        **_WITHOUT_SHARED,
        dropped=frozenset({"full_attention_interval"}),
        widening="its first layers have linear attention, which cannot average over the text",
        rules=(_SILU,),
    ),
)


_SAYS = {
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "num_key_value_heads": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "sliding_window": None,
}
_EVERYWHERE: Rule = (
    lambda c: not c.get("mlp_only_layers") and c.get("decoder_sparse_step", 1) == 1,
    "some layers have a plain FFN (mlp_only_layers, decoder_sparse_step), which has no experts to choose",
)
_CHOOSES: Rule = (
    lambda c: 1 <= whole(c, "num_experts_per_tok") <= Routed.count(c),
    "a token has more experts than there are, or none (num_experts_per_tok)",
)


def _is_normed(config: Config) -> bool:
    return bool(config.get("norm_topk_prob"))


def _routed(partner: dict[str, Any], defaults: dict[str, object], *rules: Rule, ffn: str = "mlp", **says: Any) -> Native:
    """A base that is what the partner of another family is. `ffn`: under the layer; `defaults`: of its class."""
    stack = Stack(parts={part: LINEAR[part] for part in "qkvo"}, ffn=ffn)
    family = Family(partner["native_type"], stacks=(stack,), defaults={**_SAYS, **defaults})
    return Native(family, **{**partner, "serves": "vLLM, llama.cpp"}, fixed=_QUIET, rules=(_SILU, _CHOOSES, *rules), **says)


ROUTED: tuple[Native, ...] = (
    _routed(
        _QWEN3_MOE,
        {"rms_norm_eps": 1e-6, "norm_topk_prob": False, "num_key_value_heads": 4, "use_sliding_window": False},
        _EVERYWHERE,
        dropped=frozenset({"num_local_experts"}),
        gguf_differs=((lambda c: not _is_normed(c), "its qwen3moe divides the weights of the chosen experts by their sum"),),
        routed=Routed(sums_to_one=_is_normed),
    ),
    _routed(
        _MIXTRAL,
        {"rms_norm_eps": 1e-5, "num_key_value_heads": 8, "router_jitter_noise": 0.0},
        dropped=frozenset({"attention_bias", "num_experts"}),
        routed=Routed(),
    ),
    _routed(
        _QWEN2_MOE,
        {"rms_norm_eps": 1e-6, "norm_topk_prob": False, "num_key_value_heads": 16, "use_sliding_window": False},
        _EVERYWHERE,
        _ONE_WINDOW,
        heads_fill("Qwen2-MoE"),
        dropped=frozenset({"attention_bias", "num_local_experts"}),
        gguf_differs=((_is_normed, "its qwen2moe does not divide the weights of the chosen experts by their sum"),),
        routed=Routed(
            shared_down="mlp.shared_expert.down_proj.weight", shared_gate="mlp.shared_expert_gate", sums_to_one=_is_normed
        ),
    ),
    _routed(
        _GRANITE_MOE,
        {"rms_norm_eps": 1e-6, **_NO_FACTORS, "attention_multiplier": 1.0},
        heads_fill("GraniteMoE"),
        ffn="block_sparse_moe",
        dropped=frozenset({"num_experts", "sliding_window"}),
        routed=Routed(
            "block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj", "block_sparse_moe.router.weight"
        ),
    ),
)

WHY_NOT = {
    "gpt_oss": "its attention has sinks and its experts clamp and add to what they compute",
    "olmoe": "its norms of queries and keys run over all heads, which further channels would change",
}
"""Type -> why N fine-tunes of such a base are no plain mixture of its family."""


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
        row.native_type == config.get("model_type") and row.empty and config.get("shared_expert_intermediate_size") == 0
        for row in NATIVES
    )


def native_of(native_type: str, model_type: str) -> Native:
    """The row of a finished checkpoint. Raises StopIteration when there is none."""
    return next(row for row in (*NATIVES, *ROUTED) if (row.native_type, row.family.model_type) == (native_type, model_type))
