"""Dense families and the native MoE architecture that says their mixture exactly: one row of data each.

A row names where a dense decoder keeps its FFN, where the native architecture keeps experts and router, and how the
native config follows from the dense one. `choose_family` returns the first row whose rules all hold, or refuses with
every reason. A new pair is a new row; the oracle tests in tests/test_families.py run over `FAMILIES`.

What makes a row exact is written in its rules and `fixed` settings: the native block must renormalise the weights of
the chosen experts to one, attention, norms and rotary embedding must be the same code, and every default that differs
between the two configs must be written out (`defaults` are the dense family's, for config.json files that are silent).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from modekit.errors import SourceError, UnsupportedError

Config = Mapping[str, Any]
Rule = tuple[Callable[[Config], bool], str]
"""(holds for this dense config, reason shown when it does not)."""

LAYER = "model.layers.{layer}."


@dataclass(frozen=True)
class Constant:
    """A tensor that the native architecture wants and the dense family lacks: zeros, so that it adds nothing.

    `shape` is given in the letters D hidden, F expert hidden, E experts, or digits.
    """

    name: str
    shape: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """One dense family and its native partner.

    Attributes:
        model_type: `model_type` of the dense config.
        native_type: `model_type` of the result.
        native_class: `architectures[0]` of the result.
        mlp: name under the layer of the dense gate, up and down projections, each (F, D), (F, D), (D, F).
        experts: native name per projection with `{expert}`; None when the native layout fuses experts in one tensor.
        fused: native names of the fused (E, 2F, D) and (E, D, F) tensors; None when experts are tensors of their own.
        router: native name under the layer of the (E, D) gate.
        router_module: attribute path under the loaded decoder layer of the module that returns (logits, weights, index).
        mlp_module: attribute path of the block in a loaded dense layer; its input is what the router will read.
        block_module: attribute path of the block in a loaded native layer.
        num_experts_key, top_k_key: config keys of the native architecture.
        expert_hidden_key: native config key of F when it is not `intermediate_size`.
        head_dim: the dense default when config.json is silent; None means hidden / heads.
        rope_theta: the dense default.
        layer_types: the kind of attention per layer that the dense class takes when config.json is silent.
        defaults: other dense defaults to write out.
        fixed: native settings that make the row exact.
        computed: native settings that follow from the dense config.
        dropped: dense keys that mean nothing to the native architecture.
        constants: see `Constant`.
        rules: what must hold.
        serves: where the result runs besides transformers.
    """

    model_type: str
    native_type: str
    native_class: str
    router: str = "mlp.gate.weight"
    mlp: Mapping[str, str] = field(
        default_factory=lambda: {
            "gate": "mlp.gate_proj.weight",
            "up": "mlp.up_proj.weight",
            "down": "mlp.down_proj.weight",
        }
    )
    experts: Mapping[str, str] | None = field(
        default_factory=lambda: {
            "gate": "mlp.experts.{expert}.gate_proj.weight",
            "up": "mlp.experts.{expert}.up_proj.weight",
            "down": "mlp.experts.{expert}.down_proj.weight",
        }
    )
    fused: tuple[str, str] | None = None
    router_module: str = "mlp.gate"
    mlp_module: str = "mlp"
    block_module: str = "mlp"
    num_experts_key: str = "num_experts"
    top_k_key: str = "num_experts_per_tok"
    expert_hidden_key: str | None = None
    head_dim: int | None = None
    writes_head_dim: bool = True
    rope_theta: float = 10_000.0
    rope_per_layer_type: bool = False
    layer_types: Callable[[Config], list[str]] | None = None
    defaults: Config = field(default_factory=dict)
    fixed: Config = field(default_factory=dict)
    computed: Mapping[str, Callable[[Config], object]] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()
    constants: tuple[Constant, ...] = ()
    rules: tuple[Rule, ...] = ()
    serves: str = "vLLM"

    @property
    def label(self) -> str:
        """Row name for messages and tests."""
        return f"{self.model_type}->{self.native_type}"

    def refusals(self, config: Config) -> list[str]:
        """Why this row does not fit a dense config; empty when it does."""
        full = self.dense_config(config)
        return [reason for holds, reason in self.rules if not holds(full)]

    def dense_config(self, config: Config) -> dict[str, Any]:
        """The dense config with every default written out and rope in one form."""
        full: dict[str, Any] = {**self.defaults, **config}  # an explicit null is a setting, too
        if full.get("num_key_value_heads") is None:
            full["num_key_value_heads"] = full["num_attention_heads"]
        if full.get("head_dim") is None:
            full["head_dim"] = self.head_dim or int(full["hidden_size"]) // int(full["num_attention_heads"])
        if full.get("use_sliding_window") is False:
            full["sliding_window"] = None
        if self.layer_types is not None and full.get("layer_types") is None:
            full["layer_types"] = self.layer_types(full)
        full["rope_parameters"] = rope_parameters(config, self.rope_theta)
        full.pop("rope_theta", None)
        full.pop("rope_scaling", None)
        return full

    def native_config(self, config: Config, *, experts: int, top_k: int, expert_hidden: int, dtype: str) -> dict[str, Any]:
        """The native config.json: the dense one, renamed and completed.

        `experts` is E, `expert_hidden` is F, `dtype` one of float32, bfloat16, float16.
        """
        native = self.dense_config(config)
        for key in (*self.dropped, *_NOT_ARCHITECTURE):
            native.pop(key, None)
        if not self.writes_head_dim:
            native.pop("head_dim", None)
        if self.rope_per_layer_type:
            rope = native["rope_parameters"]
            native["rope_parameters"] = {"full_attention": rope, "sliding_attention": rope}
        native.update(self.fixed)
        native.update(
            {
                "architectures": [self.native_class],
                "model_type": self.native_type,
                "dtype": dtype,
                self.num_experts_key: experts,
                self.top_k_key: top_k,
                "intermediate_size": expert_hidden,
            }
        )
        if self.expert_hidden_key is not None:
            native[self.expert_hidden_key] = expert_hidden
        native.update({key: compute(native) for key, compute in self.computed.items()})
        return native


_NOT_ARCHITECTURE = (
    "_name_or_path", "auto_map", "torch_dtype", "dtype", "transformers_version", "architectures", "model_type",
)  # fmt: skip


def rope_parameters(config: Config, default_theta: float) -> dict[str, Any]:
    """Rotary settings in transformers 5 form, from `rope_parameters` or the older `rope_theta` and `rope_scaling`."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise SourceError(
            "the rotary settings in config.json are not a mapping", found=given, expected="rope_type, rope_theta, ...",
            remedy="download or save the model again",
        )  # fmt: skip
    rope = dict(given)
    if "type" in rope:
        rope.setdefault("rope_type", rope.pop("type"))
    rope.setdefault("rope_type", "default")
    rope.setdefault("rope_theta", config.get("rope_theta") or default_theta)
    return rope


def _windows_after(config: Config) -> list[str]:
    """Qwen2 and Qwen3: the layers from max_window_layers on have the window, if there is one."""
    layers, first = int(config["num_hidden_layers"]), int(config["max_window_layers"])
    windowed = config.get("sliding_window") is not None
    return ["sliding_attention" if windowed and layer >= first else "full_attention" for layer in range(layers)]


def _every(key: str, default: int, most: str) -> Callable[[Config], list[str]]:
    """One full-attention layer in every `config[key]`, the others `most`."""

    def kinds(config: Config) -> list[str]:
        period = int(config.get(key) or default)
        return ["full_attention" if (layer + 1) % period == 0 else most for layer in range(int(config["num_hidden_layers"]))]

    return kinds


def _silu(config: Config) -> bool:
    return config.get("hidden_act", "silu") in {"silu", "swish"}


def _whole_heads(config: Config) -> bool:
    heads = int(config["num_attention_heads"])
    head_dim = config.get("head_dim")
    return int(config["hidden_size"]) % heads == 0 and head_dim in {None, int(config["hidden_size"]) // heads}


def _one_attention_kind(config: Config) -> bool:
    return len(set(config.get("layer_types") or [])) < 2


def _no_window(config: Config) -> bool:
    return "sliding_attention" not in (config.get("layer_types") or [])


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
    "dropped": frozenset({"mlp_bias", "pretraining_tp", "layer_types", "use_sliding_window", "sliding_window"}),
    "serves": "vLLM, llama.cpp",
}
_TOKENS_OF_LLAMA = {"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False, "hidden_act": "silu"}
_NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "tie_word_embeddings": False}

FAMILIES: tuple[Family, ...] = (
    Family(
        model_type="llama",
        **_MIXTRAL,
        defaults={**_TOKENS_OF_LLAMA, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
        rules=(
            (lambda c: not c.get("attention_bias"), "attention has biases, Mixtral's has none"),
            _NO_MLP_BIAS,
            _SILU,
        ),
    ),
    Family(
        model_type="llama",
        **_GRANITE_MOE,
        fixed={"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0},
        computed={"attention_multiplier": lambda c: (c["hidden_size"] // c["num_attention_heads"]) ** -0.5},
        defaults={**_TOKENS_OF_LLAMA, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "attention_bias": False},
        rules=(
            _NO_MLP_BIAS,
            _SILU,
            (_whole_heads, "head_dim is not hidden_size / num_attention_heads, which GraniteMoE assumes"),
        ),
    ),
    Family(
        model_type="mistral",
        **_MIXTRAL,
        defaults={
            **_TOKENS_OF_LLAMA, "rms_norm_eps": 1e-6, "max_position_embeddings": 131_072, "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
        rules=(
            _SILU,
            (_one_attention_kind, "layers differ in their attention window, Mixtral's are all alike"),
        ),
    ),
    Family(
        model_type="qwen2",
        native_type="qwen2_moe",
        native_class="Qwen2MoeForCausalLM",
        expert_hidden_key="moe_intermediate_size",
        defaults={
            **_NO_TOKENS, "rms_norm_eps": 1e-6, "max_position_embeddings": 32_768, "hidden_act": "silu",
            "use_sliding_window": False, "max_window_layers": 28, "sliding_window": None,
        },
        fixed={
            "norm_topk_prob": True, "qkv_bias": True, "shared_expert_intermediate_size": 0, "decoder_sparse_step": 1,
            "mlp_only_layers": [], "output_router_logits": False,
        },
        constants=(
            Constant("mlp.shared_expert.gate_proj.weight", ("0", "D")),
            Constant("mlp.shared_expert.up_proj.weight", ("0", "D")),
            Constant("mlp.shared_expert.down_proj.weight", ("D", "0")),
            Constant("mlp.shared_expert_gate.weight", ("1", "D")),
        ),
        layer_types=_windows_after,
        rules=(_SILU, (_whole_heads, "head_dim is not hidden_size / num_attention_heads, which Qwen2-MoE assumes")),
    ),
    Family(
        model_type="qwen3",
        native_type="qwen3_moe",
        native_class="Qwen3MoeForCausalLM",
        expert_hidden_key="moe_intermediate_size",
        head_dim=128,
        defaults={
            **_NO_TOKENS, "rms_norm_eps": 1e-6, "max_position_embeddings": 32_768, "hidden_act": "silu",
            "use_sliding_window": False, "max_window_layers": 28, "sliding_window": None, "attention_bias": False,
        },
        fixed={
            "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "output_router_logits": False,
            "use_sliding_window": False, "sliding_window": None,
        },
        dropped=frozenset({"layer_types", "max_window_layers"}),
        layer_types=_windows_after,
        rules=(
            _SILU,
            (_no_window, "some layers have a sliding window, which Qwen3-MoE applies to all or none"),
        ),
        serves="vLLM, llama.cpp",
    ),
    Family(
        model_type="qwen3",
        native_type="mellum",
        native_class="MellumForCausalLM",
        expert_hidden_key="moe_intermediate_size",
        head_dim=128,
        rope_per_layer_type=True,
        defaults={
            **_NO_TOKENS, "rms_norm_eps": 1e-6, "max_position_embeddings": 32_768, "hidden_act": "silu",
            "use_sliding_window": False, "max_window_layers": 28, "sliding_window": None, "attention_bias": False,
        },
        fixed={"norm_topk_prob": True, "output_router_logits": False},
        dropped=frozenset({"max_window_layers", "use_sliding_window"}),
        layer_types=_windows_after,
        rules=(_SILU, (lambda c: bool(c["sliding_window"]), "it is needed only for layers with a window, and there is none")),
    ),
    Family(
        model_type="granite",
        **_GRANITE_MOE,
        defaults={
            **_TOKENS_OF_LLAMA, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "attention_bias": False,
            "embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0, "attention_multiplier": 1.0,
        },
        rules=(
            _NO_MLP_BIAS,
            _SILU,
            (_whole_heads, "head_dim is not hidden_size / num_attention_heads, which GraniteMoE assumes"),
        ),
    ),
    Family(
        model_type="olmo2",
        native_type="flex_olmo",
        native_class="FlexOlmoForCausalLM",
        writes_head_dim=False,
        defaults={
            "pad_token_id": 1, "bos_token_id": None, "eos_token_id": 50_279, "tie_word_embeddings": False,
            "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "hidden_act": "silu", "attention_bias": False,
        },
        fixed={"norm_topk_prob": True, "output_router_logits": False},
        rules=(_SILU, (_whole_heads, "head_dim is not hidden_size / num_attention_heads, which FlexOlmo assumes")),
    ),
    Family(
        model_type="cohere2",
        native_type="cohere2_moe",
        native_class="Cohere2MoeForCausalLM",
        defaults={
            "pad_token_id": 0, "bos_token_id": 5, "eos_token_id": 255_001, "tie_word_embeddings": True,
            "layer_norm_eps": 1e-5, "max_position_embeddings": 8192, "hidden_act": "silu", "attention_bias": False,
            "logit_scale": 0.0625, "sliding_window": 4096,
        },
        layer_types=_every("sliding_window_pattern", 4, "sliding_attention"),
        dropped=frozenset({"sliding_window_pattern"}),
        fixed={"num_shared_experts": 0, "expert_selection_fn": "softmax", "output_router_logits": False},
        rules=(
            _SILU,
            (_whole_heads, "head_dim is not hidden_size / num_attention_heads, which Cohere2 assumes"),
        ),
    ),
    Family(
        model_type="ernie4_5",
        native_type="ernie4_5_moe",
        native_class="Ernie4_5_MoeForCausalLM",
        num_experts_key="moe_num_experts",
        top_k_key="moe_k",
        expert_hidden_key="moe_intermediate_size",
        head_dim=128,
        rope_theta=500_000.0,
        defaults={
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131_072, "hidden_act": "silu", "use_bias": False, "num_key_value_heads": 2,
        },
        fixed={
            "moe_num_shared_experts": 0, "moe_layer_start_index": 0, "moe_layer_end_index": -1, "moe_layer_interval": 1,
            "output_router_logits": False,
        },
        constants=(Constant("mlp.moe_statics.e_score_correction_bias", ("1", "E")),),
        rules=(_SILU, (lambda c: not c.get("use_bias"), "layers have biases (use_bias), the experts' are not copied")),
    ),
    Family(
        model_type="hunyuan_v1_dense",
        native_type="hunyuan_v1_moe",
        native_class="HunYuanMoEV1ForCausalLM",
        router="mlp.gate.wg.weight",
        top_k_key="moe_topk",
        defaults={
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 2048, "hidden_act": "silu", "attention_bias": False,
        },
        fixed={"output_router_logits": False},
        constants=(
            Constant("mlp.shared_mlp.gate_proj.weight", ("F", "D")),
            Constant("mlp.shared_mlp.up_proj.weight", ("F", "D")),
            Constant("mlp.shared_mlp.down_proj.weight", ("D", "F")),
        ),
        rules=(_SILU,),
    ),
    Family(
        model_type="qwen3_5_text",
        native_type="qwen3_5_moe_text",
        native_class="Qwen3_5MoeForCausalLM",
        expert_hidden_key="moe_intermediate_size",
        head_dim=256,
        defaults={
            **_NO_TOKENS, "rms_norm_eps": 1e-6, "max_position_embeddings": 32_768, "hidden_act": "silu",
            "attention_bias": False, "num_key_value_heads": 4,
        },
        fixed={"shared_expert_intermediate_size": 0, "output_router_logits": False},
        constants=(
            Constant("mlp.shared_expert.gate_proj.weight", ("0", "D")),
            Constant("mlp.shared_expert.up_proj.weight", ("0", "D")),
            Constant("mlp.shared_expert.down_proj.weight", ("D", "0")),
            Constant("mlp.shared_expert_gate.weight", ("1", "D")),
        ),
        layer_types=_every("full_attention_interval", 4, "linear_attention"),
        dropped=frozenset({"full_attention_interval"}),
        rules=(_SILU,),
    ),
)  # fmt: skip

_WITHOUT_PARTNER = {
    "lfm2": "LFM2-MoE weighs experts by a sigmoid over (sum + 1e-6), which is no softmax and off by 1e-3 for small scores",
    "gemma2": "GeGLU experts and sandwich norms",
    "gemma3_text": "GeGLU experts and sandwich norms",
    "phi3": "fused projections",
    "olmo3": "a window that differs between layers",
    "smollm3": "layers without rotary embedding",
    "exaone4": "norms after the block",
    "glm4": "four norms per layer and interleaved partial rotary embedding",
    "starcoder2": "an FFN without a gate",
}


def choose_family(config: Config, *, where: str) -> Family:
    """The first row that says a mixture of this dense config exactly.

    Raises UnsupportedError with the reason of every row that was tried.
    """
    rows = family_rows(config, where=where)
    tried = []
    for row in rows:
        refusals = row.refusals(config)
        if not refusals:
            return row
        tried.append(f"{row.native_type}: {'; '.join(refusals)}")
    raise UnsupportedError(
        f"no native architecture says a mixture of this '{rows[0].model_type}' model exactly",
        where=where,
        found=" | ".join(tried),
        remedy="choose a base model without these features",
    )


def family_rows(config: Config, *, where: str) -> list[Family]:
    """All rows of a config's dense family. Raises UnsupportedError when there is none."""
    model_type = str(config.get("model_type"))
    rows = [row for row in FAMILIES if row.model_type == model_type]
    if not rows:
        known = sorted({row.model_type for row in FAMILIES})
        reason = _WITHOUT_PARTNER.get(model_type)
        if "text_config" in config:
            reason = "it wraps a language model; give that part alone (its text_config and weights)"
        raise UnsupportedError(
            f"no native architecture says a mixture of '{model_type}' models exactly" + (f": {reason}" if reason else ""),
            where=where,
            expected=f"a family of {', '.join(known)}",
            remedy="choose a base model of one of these families",
        )
    return rows


def family_of(native_type: str, model_type: str) -> Family:
    """The row of a finished checkpoint."""
    return next(row for row in FAMILIES if (row.native_type, row.model_type) == (native_type, model_type))


CONFIG_MUST_MATCH = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "rms_norm_eps", "layer_norm_eps", "rope_parameters", "attention_bias", "mlp_bias",
    "tie_word_embeddings", "sliding_window", "layer_types", "vocab_size", "intermediate_size", "use_bias",
    "linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim", "linear_num_key_heads", "linear_num_value_heads",
    "embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier", "logit_scale",
)  # fmt: skip
"""Config keys in which an expert must equal the base model; compared after `Family.dense_config`."""
