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

from modekit.recipes.recipe import Recipe
from modekit.sources.family import Config, Family, words
from modekit.sources.native_row import (
    FAMILY,
    HEADS_ARE_NORMED,
    NO_ATTENTION,
    NO_MLP_BIAS,
    SILU,
    Constant,
    Native,
    Widening,
    experts_in,
    heads_fill,
    mapping,
)
from modekit.sources.native_shared import IN_SHARED

_WINDOW_IN_SOME = "some layers have a sliding window, which Qwen3-MoE applies to all or none"


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
        rules=(SILU, (lambda c: "sliding_attention" not in words(c, "layer_types"), _WINDOW_IN_SOME)),
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
        experts=experts_in("feed_forward", "w1", "w3", "w2"),
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

NATIVES: tuple[Native, ...] = (*IN_SHARED, *IN_THEIR_OWN)
_WITHOUT_PARTNER = {
    "m2m_100": "NLLB-MoE in transformers runs no more than its first two experts",
    "t5": "Switch Transformers multiply what an expert says by its router's probability, which is never 1",
    "gemma": "GeGLU experts",
    "gemma2": "GeGLU experts and sandwich norms",
    "gemma3_text": "GeGLU experts and sandwich norms",
    "gemma4_text": "GeGLU experts and sandwich norms",
    "ministral3": "queries that grow with their position",
    "olmo3": "a window that differs between layers",
    "exaone4": "norms after the block",
    "glm4": "four norms per layer and interleaved partial rotary embedding",
    "starcoder2": "an FFN without a gate",
}


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
    reason = _WITHOUT_PARTNER.get(family.model_type, "none exists")
    return None, tried or [f"no native architecture holds a mixture of '{family.model_type}': {reason}"]


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
