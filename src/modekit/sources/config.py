"""config.json of a model, which anyone may have written: read as data, with values of the right kind.

After `check_values` the settings that modekit computes with are what their names say: sizes are whole numbers, names are text,
and nothing is so large that arithmetic with it fails.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from modekit.errors import SourceError
from modekit.files.read import UNREADABLE, read_json
from modekit.files.typed import entries

Config = Mapping[str, object]
"""config.json of a model, or adapter_config.json, as data: `whole`, `number` and `words` read what has to be of a kind."""

SAVE_AGAIN = "download or save the model again"
OF_A_MIXTURE = "give the model that its experts were fine-tuned from; `modekit add` adds an expert to a mixture"
FROM_GGUF = (
    "give the model in safetensors; transformers unpacks a GGUF: AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=NAME, "
    "quantization_config=GgufConfig(dequantize=True)), then save_pretrained, and the tokenizer by gguf_file, too"
)
_KINDS: dict[type, str] = {
    int: "hidden_size intermediate_size num_hidden_layers num_attention_heads vocab_size num_key_value_heads head_dim "
    "max_position_embeddings sliding_window max_window_layers full_attention_interval linear_conv_kernel_dim "
    "linear_key_head_dim linear_value_head_dim linear_num_key_heads linear_num_value_heads d_model decoder_vocab_size "
    "encoder_layers decoder_layers encoder_ffn_dim decoder_ffn_dim encoder_attention_heads decoder_attention_heads "
    "num_layers num_heads d_ff d_kv num_decoder_layers relative_attention_num_buckets relative_attention_max_distance",
    bool: "use_sliding_window tie_word_embeddings attention_bias mlp_bias use_bias scale_embedding "
    "share_encoder_decoder_embeddings",
    str: "hidden_act hidden_activation feed_forward_proj activation_function",
    float: "rms_norm_eps layer_norm_eps norm_epsilon layer_norm_epsilon rope_theta rope_local_base_freq "
    "partial_rotary_factor embedding_multiplier residual_multiplier logits_scaling attention_multiplier logit_scale "
    "query_pre_attn_scalar final_logit_softcapping attn_logit_softcapping clip_qkv",
    list: "layer_types",
    dict: "rope_parameters rope_scaling",
}
"""The settings that anything is computed from; what is not named here is carried as it is."""
_MAY_BE_0 = ("sliding_window", "max_window_layers")
_MAY_DIFFER = {"max_position_embeddings", "max_window_layers", "full_attention_interval"}
_SAID_OTHERWISE = {"use_sliding_window", "rope_theta", "rope_scaling", "vocab_size"}
"""`Family.dense_config` has what they mean under other keys; how tokens may differ says vocabulary.py."""
_COMPARED = [key for keys in _KINDS.values() for key in keys.split() if key not in _MAY_DIFFER | _SAID_OTHERWISE]
MUST_MATCH = ("model_type", *_COMPARED)
"""Keys in which an expert must equal the base model; compared after `Family.dense_config`."""
_NEEDED = "hidden_size intermediate_size num_hidden_layers num_attention_heads vocab_size"
_NEEDED_OF_A_PAIR = (
    "d_model vocab_size encoder_layers decoder_layers encoder_ffn_dim decoder_ffn_dim encoder_attention_heads "
    "decoder_attention_heads",
    "d_model vocab_size num_layers num_heads d_ff d_kv",
)
"""Of which a config gives all of one kind: Bart's or T5's."""


def whole(config: Config, key: str) -> int:
    """A whole number that a config gives. Raises SourceError where it gives none."""
    value = config.get(key)
    if type(value) is not int:
        raise no_usable(key, value, "a whole number")
    return value


def number(config: Config, key: str, default: float | None = None) -> float:
    """A number that a config gives; `default` where it gives none, or 0. Raises SourceError for anything else."""
    value = config.get(key)
    value = default if default is not None and not value else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise no_usable(key, value, "a number")
    return float(value)


def words(config: Config, key: str) -> list[object]:
    """A list that a config gives, empty where it gives none. Raises SourceError for anything else."""
    value = config.get(key) or []
    if not isinstance(value, list):
        raise no_usable(key, value, "a list")
    return value


def architecture_of(config: Config) -> str:
    """The class of transformers that a config names first."""
    return str(next(iter(words(config, "architectures")), ""))


def no_usable(key: str, found: object, expected: str | None, where: str | None = None, remedy: str = SAVE_AGAIN) -> SourceError:
    """The error of a setting that nothing can be computed from."""
    return damaged_model(f"config.json gives no usable {key[:64]}", where, found, expected, remedy)


def damaged_model(
    what: str, where: str | None, found: object = None, expected: str | None = None, remedy: str = SAVE_AGAIN
) -> SourceError:
    """The error of a model whose files contradict each other, or cannot be read."""
    return SourceError(what, where=where, found=found, expected=expected, remedy=remedy)


def read_config(folder: Path, *, where: str) -> dict[str, object]:
    """A model's config.json as data, by its folder or the file. Raises SourceError when it is missing or no JSON."""
    try:
        config = read_json(folder if folder.is_file() else folder / "config.json")
    except FileNotFoundError:
        refuse_other_kinds([path.name for path in folder.glob("*")], where=where)
        raise SourceError("config.json is missing", where=where, remedy="give a transformers model folder") from None
    except UNREADABLE as error:
        raise damaged_model("config.json cannot be read", where, error) from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise SourceError("config.json names no model_type", where=where, remedy="give a transformers model folder")
    return config


def refuse_other_kinds(names: Collection[str], *, where: str) -> None:
    """Raise SourceError where the files of a folder that lacks a model, by name, are those of an adapter, or GGUF files."""
    if "adapter_config.json" in names:
        its_base = "give a full model, like the one that it was trained on (base_model_name_or_path in its adapter_config.json)"
        remedy = "name it as adapter: in place of model: in the recipe" if where.startswith("experts[") else its_base
        raise SourceError("this is an adapter, not a full model", where=where, remedy=remedy) from None
    files = sorted(name for name in names if name.endswith(".gguf"))
    if files:
        raise SourceError("GGUF files are not read", where=where, found=", ".join(files[:3]), remedy=FROM_GGUF) from None


def is_mixture(config: Config) -> bool:
    """Whether a plain model is itself a mixture of experts."""
    return any(config.get(key) for key in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"))


def check_values(config: Config, *, where: str, pair: bool = False) -> None:
    """Raise SourceError when a setting is missing that every plan needs, or has a value of another kind than its name says.

    For configs of the families in families.py, or where `pair` of those in pairs.py: others may call something else by these
    names.
    """
    where, needed = f"{where}: config.json", (_NEEDED,) if not pair else _NEEDED_OF_A_PAIR
    for key in min(map(str.split, needed), key=lambda keys: sum(config.get(key) is None for key in keys)):
        if config.get(key) is None:
            raise no_usable(key, None, "a whole number", where)
    for kind, keys in _KINDS.items():
        for key in keys.split():
            value = config.get(key)
            most = 2**20 if pair and key == "max_position_embeddings" else 2**40  # some compute as many sines and cosines
            if value is not None and not _is_kind(value, kind, (key not in _MAY_BE_0, most)):
                raise no_usable(key, value, f"{kind.__name__}", where)
    for key in ("rope_parameters", "rope_scaling"):
        for name, each in entries(config.get(key)):  # a kind is a word, and a number one that fits a float
            if (name in ("rope_type", "type") and not isinstance(each, str)) or (isinstance(each, int) and abs(each) > 2**60):
                raise no_usable(key, config[key], "a kind, and numbers that can be computed with", where)
    if pair and config.get("share_encoder_decoder_embeddings") is False:
        raise SourceError(
            "encoder and decoder have embeddings of their own, which no mixture of this family has yet",
            where=where,
            found="share_encoder_decoder_embeddings: false",
            remedy="choose a base model that shares its embedding",
        )


def _is_kind(value: object, kind: type, span: tuple[int, int]) -> bool:
    if kind is int:
        return type(value) is int and span[0] <= value <= span[1]
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and -1e30 < value < 1e30
    return type(value) is kind and (not isinstance(value, list) or all(isinstance(each, str) for each in value))
