"""Dense families of one stack, a decoder each: where its parts live and what its config.json leaves unsaid. A row of data each.

A row that has a partner in `native.py` can be mixed in an architecture that other tools know; every row can be mixed in
the modekit architecture, which replaces the named parts in the installed classes of the family. Families with an encoder are in
pairs.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from modekit.errors import UnsupportedError
from modekit.sources.derived import is_installed, structure
from modekit.sources.family import LINEAR, Config, Family, Stack, no_usable, whole, words
from modekit.sources.model_config import SETTINGS
from modekit.sources.pairs import PAIRS

_FUSED_GATE_UP = {**LINEAR, "gate": "mlp.gate_up_proj", "up": "mlp.gate_up_proj"}
_FUSED = {**_FUSED_GATE_UP, "q": "self_attn.qkv_proj", "k": "self_attn.qkv_proj", "v": "self_attn.qkv_proj"}


def _windows_after(config: Config) -> list[str]:
    """Qwen2 and Qwen3: the layers from max_window_layers on have the window, if there is one."""
    layers, first = whole(config, "num_hidden_layers"), whole(config, "max_window_layers")
    windowed = config.get("sliding_window") is not None
    return ["sliding_attention" if windowed and layer >= first else "full_attention" for layer in range(layers)]


def _alternating(config: Config) -> list[str]:
    """Gemma 2: the window in every other layer, the first has one."""
    return ["full_attention" if layer % 2 else "sliding_attention" for layer in range(whole(config, "num_hidden_layers"))]


def _every(key: str, default: int, most: str) -> Callable[[Config], list[str]]:
    """One full-attention layer in every `config[key]`, the others `most`."""

    def kinds(config: Config) -> list[str]:
        period = config.get(key) or default
        if not isinstance(period, int):
            raise no_usable(key, period, "a whole number of layers")
        return ["full_attention" if (layer + 1) % period == 0 else most for layer in range(whole(config, "num_hidden_layers"))]

    return kinds


def _rope_by_kind(config: Config) -> Config:
    """Gemma 3 since transformers 5: rotary settings for each kind of attention; before, those of windows were one number."""
    rope = config["rope_parameters"]
    assert isinstance(rope, Mapping)
    local = {"rope_type": "default", "rope_theta": config.get("rope_local_base_freq") or 10_000.0}
    kinds = rope if "full_attention" in rope else {"full_attention": rope, "sliding_attention": local}
    said = {kind: kinds.get(kind) for kind in ("full_attention", "sliding_attention")}
    return {**config, "rope_parameters": said, "rope_local_base_freq": None}


def _partial_rope(config: Config) -> Config:
    """Qwen3.5: a quarter of each head turns, unless config.json says otherwise."""
    rope = config["rope_parameters"]
    assert isinstance(rope, Mapping)
    return {**config, "rope_parameters": {"partial_rotary_factor": 0.25, **rope}}


def _gemma4_kinds(config: Config) -> list[str]:
    """Gemma 4: a window in five of six layers, never in the last one."""
    count = whole(config, "num_hidden_layers")
    return ["full_attention" if layer % 6 == 5 or layer == count - 1 else "sliding_attention" for layer in range(count)]


def _gemma4_unread(config: Config) -> frozenset[str]:
    """Gemma 4: keys and values of the layers that use those of earlier ones, which published files hold nevertheless."""
    config = {"num_kv_shared_layers": 0, **config}
    count, shared = whole(config, "num_hidden_layers"), whole(config, "num_kv_shared_layers")
    parts = ("k_proj", "v_proj", "k_norm", "v_norm")
    layers = range(max(count - shared, 0), min(count, 1_000))
    return frozenset(f"{Stack().layers}{layer}.self_attn.{part}.weight" for layer in layers for part in parts)


def _gemma4_layer(config: Config, layer: int) -> Config:
    """Gemma 4: layers without a window may have wider heads; the last ones may use earlier keys and values, and a wider FFN."""
    kind = next(iter(words(config, "layer_types")[layer : layer + 1]), None)
    own: Config = {}
    if kind == "full_attention":
        heads = config.get("num_global_key_value_heads") if config.get("attention_k_eq_v") else None
        own = {"head_dim": config.get("global_head_dim") or 512, **({"num_key_value_heads": heads} if heads else {})}
    if isinstance(said := config.get("per_layer_config"), Mapping):
        own = each if isinstance(each := said.get(str(layer)), Mapping) else {}
    shared = layer >= whole(config, "num_hidden_layers") - whole(config, "num_kv_shared_layers")
    wide = {"intermediate_size": 2 * whole(config, "intermediate_size")} if shared and config.get("use_double_wide_mlp") else {}
    return {**config, **own, **wide, "kind": f"{kind} without keys" if shared else kind}


_SILU = {"hidden_act": "silu", "tie_word_embeddings": False}
_LLAMA = {**_SILU, "bos_token_id": 1, "eos_token_id": 2, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
_FACTORS = ("embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier")
_NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_QWEN = {**_SILU, **_NO_TOKENS, "rms_norm_eps": 1e-6, "max_position_embeddings": 32_768}
_QWEN_WINDOW = {"use_sliding_window": False, "max_window_layers": 28, "sliding_window": None}
_GEMMA = {"tie_word_embeddings": True, "num_key_value_heads": 4, "sliding_window": 4096}
_GELU = {"hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6}

DECODERS: tuple[Family, ...] = (
    Family(model_type="llama", defaults={**_LLAMA, "attention_bias": False}),
    Family(
        model_type="mistral",
        defaults={**_LLAMA, "max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
    ),
    Family(model_type="qwen2", defaults={**_QWEN, **_QWEN_WINDOW}, layer_types=_windows_after),
    Family(
        model_type="qwen3",
        head_dim=128,
        defaults={**_QWEN, **_QWEN_WINDOW, "attention_bias": False},
        layer_types=_windows_after,
    ),
    Family(model_type="granite", defaults={**_LLAMA, "attention_bias": False, **dict.fromkeys(_FACTORS, 1.0)}),
    Family(
        model_type="olmo2",
        defaults={
            **{**_SILU, "pad_token_id": 1, "bos_token_id": None, "eos_token_id": 50_279},
            **{"rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "attention_bias": False},
        },
    ),
    Family(
        model_type="cohere2",
        defaults={
            **{"pad_token_id": 0, "bos_token_id": 5, "eos_token_id": 255_001, "tie_word_embeddings": True},
            **{"layer_norm_eps": 1e-5, "max_position_embeddings": 8192, "hidden_act": "silu", "attention_bias": False},
            **{"logit_scale": 0.0625, "sliding_window": 4096},
        },
        layer_types=_every("sliding_window_pattern", 4, "sliding_attention"),
    ),
    Family(
        model_type="ernie4_5",
        head_dim=128,
        rope_theta=500_000.0,
        defaults={
            **{**_LLAMA, "pad_token_id": 0, "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
            **{"max_position_embeddings": 131_072, "use_bias": False, "num_key_value_heads": 2},
        },
    ),
    Family(
        model_type="hunyuan_v1_dense",
        heads_first=("self_attn.query_layernorm", "self_attn.key_layernorm"),
        defaults={**_LLAMA, "pad_token_id": 0, "rms_norm_eps": 1e-5, "attention_bias": False},
    ),
    Family(
        model_type="qwen3_5_text",
        head_dim=256,
        defaults={
            **{**_QWEN, "attention_bias": False, "num_key_value_heads": 4, "linear_conv_kernel_dim": 4},
            **{"linear_key_head_dim": 128, "linear_value_head_dim": 128},
            **{"linear_num_key_heads": 16, "linear_num_value_heads": 32},
        },
        layer_types=_every("full_attention_interval", 4, "linear_attention"),
        meant=_partial_rope,
        without_vllm="its linear attention is no attention to the backend by which vLLM runs transformers' classes",
    ),
    Family(model_type="gemma", head_dim=256, defaults={"tie_word_embeddings": True, "num_key_value_heads": 16}),
    Family(model_type="gemma2", head_dim=256, defaults=_GEMMA, layer_types=_alternating),
    Family(
        model_type="gemma3_text",
        heads_first=("self_attn.q_norm", "self_attn.k_norm"),
        head_dim=256,
        rope_theta=1_000_000.0,
        defaults={**_GEMMA, **_GELU, "vocab_size": 262_208, "num_attention_heads": 8, "query_pre_attn_scalar": 256},
        layer_types=_every("sliding_window_pattern", 6, "sliding_attention"),
        meant=_rope_by_kind,
    ),
    Family(
        model_type="gemma4_text",
        is_variant=lambda config: not config.get("enable_moe_block"),
        head_dim=256,
        rope_theta=1_000_000.0,
        defaults={
            **{**_GEMMA, **_GELU, "sliding_window": 512, "num_kv_shared_layers": 0},
            **{"hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262_144},
            **{"attention_k_eq_v": False, "use_double_wide_mlp": False, "use_bidirectional_attention": None},
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
                "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
            },
        },
        layer_types=_gemma4_kinds,
        of_layer=_gemma4_layer,
        unread=_gemma4_unread,
        must_match=("hidden_size_per_layer_input", "attention_k_eq_v", "use_double_wide_mlp", "use_bidirectional_attention"),
        without_vllm="its classes were not tested there",
    ),
    Family(
        model_type="ministral3",
        head_dim=128,
        rope_theta=1_000_000.0,
        defaults={**_SILU, "rms_norm_eps": 1e-5, "num_key_value_heads": 8, "sliding_window": None},
        without_vllm="its classes were not tested there",
    ),
    Family(
        model_type="phi3",
        stacks=(Stack(parts=_FUSED),),
        defaults={
            **{"hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "max_position_embeddings": 4096},
            **{"pad_token_id": 32_000, "bos_token_id": 1, "eos_token_id": 32_000, "sliding_window": None},
        },
    ),
    Family(
        model_type="olmo",
        norms_have_weights=False,
        defaults={"hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False},
    ),
    Family(
        model_type="olmo3",
        rope_theta=500_000.0,
        defaults={"hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "sliding_window": 4096},
        layer_types=_every("sliding_window_pattern", 4, "sliding_attention"),
    ),
    Family(
        model_type="smollm3",
        rope_theta=2_000_000.0,
        defaults={
            **{"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "num_key_value_heads": 4},
            **{"pad_token_id": 128_004, "bos_token_id": 128_000, "eos_token_id": 128_001, "max_position_embeddings": 32_768},
            **{"attention_bias": False, "mlp_bias": False, "no_rope_layer_interval": 4},
            **{"use_sliding_window": False, "sliding_window": None},
        },
    ),
    Family(
        model_type="exaone4",
        heads_first=("self_attn.q_norm", "self_attn.k_norm"),
        defaults={"hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "num_key_value_heads": 32},
    ),
    Family(
        model_type="glm4",
        stacks=(Stack(parts=_FUSED_GATE_UP),),
        head_dim=128,
        defaults={"hidden_act": "silu", "tie_word_embeddings": False, "num_key_value_heads": 2, "attention_bias": True},
    ),
    Family(
        model_type="starcoder2",
        stacks=(Stack(parts={**{part: LINEAR[part] for part in "qkvo"}, "up": "mlp.c_fc", "down": "mlp.c_proj"}),),
        defaults={"norm_epsilon": 1e-5, "tie_word_embeddings": True, "num_key_value_heads": 2, "use_bias": True},
    ),
    Family(
        model_type="seed_oss",
        head_dim=128,
        defaults={
            **{"hidden_act": "silu", "tie_word_embeddings": False, "num_key_value_heads": 8, "attention_bias": True},
            **{"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "rms_norm_eps": 1e-6, "attention_dropout": 0.1},
            **{"max_position_embeddings": 524_288, "attention_out_bias": False},
        },
    ),
)

FAMILIES: tuple[Family, ...] = (*DECODERS, *PAIRS)


def family_of(config: Config, *, where: str) -> Family:
    """The row of a dense config. Raises UnsupportedError when there is none."""
    model_type = str(config.get("model_type"))
    row = row_of(config)
    if row is not None:
        return row
    wraps = "text_config" in config
    if not wraps and is_installed(model_type):
        return structure(config, where=where).family
    raise UnsupportedError(
        f"models of the family '{model_type}' cannot be mixed"
        + (": it wraps a language model; give that part alone (its text_config and weights)" if wraps else ""),
        where=where,
        expected=f"a family of {', '.join(sorted({row.model_type for row in FAMILIES}))}",
        remedy="choose a base model of one of these families",
    )


def row_of(config: Config) -> Family | None:
    """The row of a dense config; None where there is none."""
    for family in FAMILIES:
        alone = family.pair and config.get("is_encoder_decoder") is False  # a decoder of such a family, by itself
        if family.model_type == config.get("model_type") and family.is_variant(config) and not alone:
            return family
    return None


def own_family(config: Config, other: Family) -> Family:
    """The row of a dense config, or where there is none another one."""
    of_type = (row for row in FAMILIES if row.model_type == config.get("model_type") and row.is_variant(config))
    return next(of_type, other)


_MAY_DIFFER = {"max_position_embeddings", "max_window_layers", "sliding_window_pattern", "full_attention_interval"}
_SAID_OTHERWISE = {"use_sliding_window", "rope_theta", "rope_scaling", "vocab_size"}
"""`Family.dense_config` has what they mean under other keys; how tokens may differ says vocabulary.py."""
CONFIG_MUST_MATCH = ("model_type", *(key for key in SETTINGS if key not in _MAY_DIFFER | _SAID_OTHERWISE))
"""Config keys in which an expert must equal the base model; compared after `Family.dense_config`."""
