"""config.json of a model, which anyone may have written: read as data, refused where it brings code, values of the right kind.

After `check_values` the settings that modekit and transformers' classes of dense models compute with are what their names say:
sizes are whole numbers, names are text, and nothing is so large that arithmetic with it fails.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from modekit.errors import SourceError
from modekit.files.read import UNREADABLE, read_json
from modekit.run import Run
from modekit.sources.family import Config, damaged_model, no_usable

_DEEPEST = 32  # containers within each other
FROM_GGUF = (
    "give the model in safetensors; transformers unpacks a GGUF: AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=NAME), "
    "then save_pretrained, and the tokenizer in the same way"
)
_REDIRECTS = frozenset({"configuration_files", "transformers_weights"})
"""Keys by which transformers reads other files than config.json and the weights that modekit checks."""
_CODE = frozenset({"auto_map", "fusion_config", "kernel_config", "use_kernel", "use_kernels", *_REDIRECTS})
"""Keys by which a config makes transformers import, download or read something else, wherever in the config they stand."""
_NO_SETTINGS = frozenset(
    {"_name_or_path", "transformers_version", "peft_version", "base_model_name_or_path", "revision", "quantization_config"}
)
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
"""What follows underscores in the names of keys that may name a repository of compiled code; those without a slash do not."""

Size = Annotated[int, Field(ge=1, le=2**40)]
Count = Annotated[int, Field(ge=0, le=2**40)]
Number = Annotated[float, Field(gt=-1e30, lt=1e30, allow_inf_nan=False)]
Word = Annotated[str, Field(max_length=200)]
Simple = None | bool | Number | Word


def _optional(kind: Any, names: str) -> dict[str, Any]:
    """Fields of one kind, which a config may leave out."""
    return dict.fromkeys(names.split(), (kind | None, None))


def _needed(names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), (Size, ...))


_READ_AS = ConfigDict(strict=True, extra="ignore")
_Values = create_model(
    "_Values",
    __config__=_READ_AS,
    **_needed("hidden_size intermediate_size num_hidden_layers num_attention_heads vocab_size"),
    **_optional(Size, "num_key_value_heads head_dim max_position_embeddings global_head_dim num_global_key_value_heads"),
    **_optional(Size, "full_attention_interval linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim"),
    **_optional(Size, "linear_num_key_heads linear_num_value_heads"),
    **_optional(Count, "num_kv_shared_layers sliding_window max_window_layers"),
    **_optional(Size | Word, "sliding_window_pattern"),
    **_optional(bool, "use_sliding_window tie_word_embeddings attention_bias mlp_bias use_bias"),
    **_optional(Word, "hidden_act hidden_activation"),
    **_optional(Number, "rms_norm_eps layer_norm_eps norm_epsilon rope_theta rope_local_base_freq partial_rotary_factor"),
    **_optional(Number, "embedding_multiplier residual_multiplier logits_scaling attention_multiplier logit_scale"),
    **_optional(Number, "query_pre_attn_scalar final_logit_softcapping attn_logit_softcapping clip_qkv"),
    **_optional(list[Word], "layer_types"),
    **_optional(list[int], "no_rope_layers"),
    **_optional(dict[str, object], "rope_parameters rope_scaling"),
)
"""The settings of dense configs that anything is computed from; what is not named here is carried as it is."""
SETTINGS = tuple(_Values.model_fields)
"""What anything is computed from."""

_SIZES_OF_A_PAIR = (
    "encoder_layers decoder_layers encoder_ffn_dim decoder_ffn_dim encoder_attention_heads decoder_attention_heads",
    "num_layers num_heads d_ff d_kv",
)
"""Of which a config gives all of one kind: Bart's or T5's."""
_PairValues = create_model(
    "_PairValues",
    __config__=_READ_AS,
    **_needed("d_model vocab_size"),
    **_optional(Size, " ".join(_SIZES_OF_A_PAIR)),
    **_optional(Size, "decoder_vocab_size num_decoder_layers"),
    **_optional(Size, "relative_attention_num_buckets relative_attention_max_distance"),
    **_optional(Annotated[int, Field(ge=1, le=2**20)], "max_position_embeddings"),  # some compute as many sines and cosines
    is_encoder_decoder=(Literal[True], True),
    **_optional(Word, "feed_forward_proj activation_function"),
    **_optional(Number, "layer_norm_epsilon"),
    **_optional(bool, "scale_embedding share_encoder_decoder_embeddings tie_word_embeddings"),
)
"""The same of families with an encoder."""


class _Rope(BaseModel):
    """Rotary settings, in one piece or per kind of layer."""

    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[str, Simple | list[Number]]

    rope_type: Word | None = None
    type: Word | None = None
    rope_theta: Number | None = None


def settings_digest(config: Config) -> str:
    """Changes with what a model's or adapter's config makes of its weights; who saved it, and where, does not count."""
    said = {key: value for key, value in config.items() if key not in _NO_SETTINGS}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def read_config(folder: Path, *, where: str) -> dict[str, object]:
    """A model's config.json as data, by its folder or the file. Raises SourceError when it is missing, no JSON, or nested past
    all use.
    """
    try:
        config = read_json(folder if folder.is_file() else folder / "config.json")
        if _is_deep(config):
            raise ValueError("nested too deeply")
    except FileNotFoundError:
        refuse_adapter(folder, where=where)
        refuse_gguf(folder, where=where)
        raise SourceError("config.json is missing", where=where, remedy="give a transformers model folder") from None
    except UNREADABLE as error:
        raise damaged_model("config.json cannot be read", where, error) from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise SourceError("config.json names no model_type", where=where, remedy="give a transformers model folder")
    return config


def refuse_adapter(folder: Path, *, where: str) -> None:
    """Raise SourceError where a folder that lacks a model holds an adapter."""
    if (folder / "adapter_config.json").exists():
        its_base = "give a full model, like the one that it was trained on (base_model_name_or_path in its adapter_config.json)"
        remedy = "name it as adapter: in place of model: in the recipe" if where.startswith("experts[") else its_base
        raise SourceError("this is an adapter, not a full model", where=where, remedy=remedy) from None


def refuse_gguf(folder: Path, *, where: str) -> None:
    """Raise SourceError where a folder that lacks a model holds GGUF files."""
    files = sorted(path.name for path in folder.glob("*.gguf"))
    if files:
        raise SourceError("GGUF files are not read", where=where, found=", ".join(files[:3]), remedy=FROM_GGUF) from None


def check_no_code(config: Config, *, where: str, run: Run) -> None:
    """Raise SourceError when a config brings Python of its own, or names other code or files, and the user did not accept it.

    For every config that reaches transformers: those of models, and of a mixture itself.
    """
    if run.trust_remote_code:
        return
    for key, value in entries(config):
        if key == "auto_map" and value:
            raise SourceError(
                "the model brings code of its own (auto_map in config.json)",
                where=where,
                found=value,
                remedy="check that the weights follow the named family, then pass --trust-remote-code",
            )
        named = key.lstrip("_").removesuffix("_internal") in _IMPLEMENTATIONS and not _is_plain(value)
        if named or (key in _CODE and value not in (None, False)):
            raise SourceError(
                f"config.json makes transformers use other code or files ({key[:64]})",
                where=where,
                found=value,
                remedy="remove the setting from config.json, or pass --trust-remote-code if you trust what it names",
            )


def check_values(config: Config, *, where: str, pair: bool = False) -> None:
    """Raise SourceError when a setting is missing that every plan needs, or has a value of another kind than its name says.

    For configs of the families in families.py, or where `pair` of those in pairs.py: others may call something else by these
    names.
    """
    if pair:
        _check_pair(config, where=where)
        return
    try:
        _Values.model_validate(dict(config))
        for key in ("rope_parameters", "rope_scaling"):
            rope = config.get(key)
            rope = rope if isinstance(rope, dict) else {}
            parts = {name: each for name, each in rope.items() if isinstance(each, dict) and name not in _Rope.model_fields}
            # One for all layers, or one per kind of layer.
            for part in ({name: each for name, each in rope.items() if name not in parts}, *parts.values()):
                _Rope.model_validate(part)
    except ValidationError as error:
        raise _unusable(config, error, where) from None


def _check_pair(config: Config, *, where: str) -> None:
    try:
        _PairValues.model_validate(dict(config))
    except ValidationError as error:
        raise _unusable(config, error, where) from None
    kind = min(map(str.split, _SIZES_OF_A_PAIR), key=lambda keys: sum(config.get(key) is None for key in keys))
    lacking = next((key for key in kind if config.get(key) is None), None)
    if lacking is not None:
        raise no_usable(lacking, None, None, f"{where}: config.json")
    if config.get("share_encoder_decoder_embeddings") is False:
        raise SourceError(
            "encoder and decoder have embeddings of their own, which no mixture of this family has yet",
            where=where,
            found="share_encoder_decoder_embeddings: false",
            remedy="choose a base model that shares its embedding",
        )


def _unusable(config: Config, error: ValidationError, where: str) -> SourceError:
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    return no_usable(name, config.get(name, first["input"]), first["msg"], f"{where}: config.json")


def _is_plain(value: object) -> bool:
    """Whether an implementation is named by a word, or several by part of the model, and none of them is a repository."""
    if isinstance(value, dict):
        return all(isinstance(each, str) and "/" not in each for each in value.values() if each is not None)
    return value is None or (isinstance(value, str) and "/" not in value)


def entries(data: object) -> Iterator[tuple[str, object]]:
    """Every key and its value in mappings, and in mappings and lists within these."""
    waiting = [data]
    while waiting:
        each = waiting.pop()
        if isinstance(each, Mapping):
            yield from each.items()
        waiting += each.values() if isinstance(each, Mapping) else each if isinstance(each, list) else ()


def _is_deep(data: object) -> bool:
    """Whether containers lie within each other so deeply that no config means it, and that code which follows them fails."""
    level = [data]
    for _ in range(_DEEPEST):
        inner = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, (dict, list)))
        level = [each for within in inner for each in within]
    return bool(level)
