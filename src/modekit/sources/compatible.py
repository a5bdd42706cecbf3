"""Can these models be mixed? Checked from configs and headers, before anything is planned.

Each model must be whole and in a float format; each expert must have the base model's architecture in every setting that
changes what a tensor means. After `check_values` the settings that modekit computes with are what their names say: sizes are
whole numbers, names are text, and nothing is so large that arithmetic with it fails.
"""

from __future__ import annotations

from collections.abc import Sequence

from modekit.errors import MismatchError, SourceError, some_of
from modekit.files.typed import entries
from modekit.recipes.layers import Layer, stack_of
from modekit.sources.adapter import AdapterSource
from modekit.sources.config import OF_A_MIXTURE, SAVE_AGAIN, Config, is_mixture, no_usable
from modekit.sources.family import UNTIE, Family
from modekit.sources.header import check_floats
from modekit.sources.names import is_ignored, layers_of, split_layer, weight_of
from modekit.sources.pairs import check_same_target
from modekit.sources.source import ModelSource

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


def check_mixable(sources: Sequence[ModelSource], family: Family) -> None:
    """Raise SourceError for a model that is not whole, MismatchError for an expert of another architecture than the base.

    `sources` are the base and then each expert's.
    """
    base = sources[0]
    models = [source for source in dict.fromkeys(sources) if not isinstance(source, AdapterSource)]
    for source in models:  # before anything is computed from their settings
        if source.config.get("model_type") == family.model_type:  # else that is said below
            check_sizes(source, family)
    for source in models:
        if source is not base:
            check_same_architecture(base, source, family)
        check_complete(source, family)
    if family.pair:
        check_same_target(sources)


def check_sizes(source: ModelSource, family: Family) -> None:
    """Raise SourceError where config.json lacks a size that every plan needs, or has other layers than the weights."""
    if family.derived is not None:  # its class was made
        return
    check_values(source.config, family, where=source.where)
    for stack in family.stacks:
        count = stack.size(source.config)
        own = len(layers_of(name for name in source.tensors if name.startswith(stack.layers)))
        if count != own:  # before anything has an entry for each of them
            raise SourceError(
                "the weights have more or fewer layers than config.json says",
                where=f"{source.where}: {stack.layers}",
                found=f"{own} layers",
                expected=f"{stack.count[0]} {count}",
                remedy=f"check that the download is complete; correct config.json, or {SAVE_AGAIN}",
            )


def check_complete(source: ModelSource, family: Family) -> None:
    """Raise SourceError unless the model is whole, in a float format.

    Every layer must have what the other layers of its kind have; embedding, final norm, head and FFN must be as configured.
    """
    if family.derived is None:
        _check_layers_alike(source, family)
    for name in family.outside(source):
        source.tensor(name)
    for name, shape in family.shapes(source.config).items():
        if source.tensor(name).shape != shape:
            raise SourceError(
                "a tensor has another shape than config.json says",
                where=f"{source.where}: {name}",
                found=list(source.tensor(name).shape),
                expected=list(shape),
                remedy="correct config.json, or save the model again",
            )
    check_floats((ref for name, ref in source.tensors.items() if not is_ignored(name)), where=source.where)


def _check_layers_alike(source: ModelSource, family: Family) -> None:
    """Raise SourceError where a layer lacks what another of its kind has."""
    layers = family.layers(source.config)
    stacks = {layer: family.stack_of(layer) for layer in layers}
    said = None if family.pair else family.dense_config(source.config).get("layer_types")
    kinds = said if isinstance(said, list) and len(said) == len(layers) else [stack_of(layer)[0] for layer in layers]
    found: dict[Layer, set[str]] = {layer: set(stack.mlp.values()) for layer, stack in stacks.items()}
    for name, layer, path in [(name, *split_layer(name)) for name in source.tensors if not is_ignored(name)]:
        own = layer in found and name == family.in_layer(layer, path)  # in no list of layers beside the model's
        if layer is not None and own and path not in stacks[layer].first:
            found[layer].add(path)
    alike: dict[object, set[str]] = {}
    for kind, names in zip(kinds, found.values(), strict=True):
        alike.setdefault(kind, set()).update(names)
    for layer, kind in zip(layers, kinds, strict=True):
        for path in sorted(alike[kind]):
            source.tensor(family.in_layer(layer, path)) if path not in found[layer] else None


def check_same_architecture(base: ModelSource, source: ModelSource, family: Family) -> None:
    """Raise MismatchError that names the setting in which an expert differs from the base model."""
    where = f"{source.where}: config.json"
    theirs_type = source.config.get("model_type")
    if theirs_type != family.model_type and is_mixture(base.config) and not is_mixture(source.config):
        raise MismatchError(
            "the base model is itself a mixture of experts, and the expert is a dense model",
            where=base.where,
            found=family.model_type,
            expected=theirs_type,
            remedy=OF_A_MIXTURE,
        )
    if theirs_type != family.model_type:
        raise MismatchError(
            "the expert is of another family than the base model",
            where=where,
            found=theirs_type,
            expected=family.model_type,
            remedy="use experts fine-tuned from this base model",
        )
    _check_no_more(base, source, family)
    ours, theirs = (family.settings(each.config, MUST_MATCH, where=each.where) for each in (base, source))
    for key in dict.fromkeys([*ours, *theirs]):
        if _plain(ours.get(key)) != _plain(theirs.get(key)):
            raise MismatchError(
                f"the expert's {key} differs from the base model's",
                where=where,
                found=theirs.get(key),
                expected=ours.get(key),
                remedy="use experts fine-tuned from this base model without changing its architecture",
            )


def _check_no_more(base: ModelSource, source: ModelSource, family: Family) -> None:
    """Raise MismatchError for a tensor of the expert alone, which would be lost."""
    copies = {*source.tensors} - {*family.own_names(source)}
    known = {*base.tensors, *family.optional, *(copies if family.derived is None else {*family.tensors})}
    extra = sorted(name for name in source.tensors if name not in known and not is_ignored(name))
    head = weight_of(family.head)
    if family.is_tied(base) and head in source.tensors and source.config.get("tie_word_embeddings") is False:
        extra = extra or [head]
    if extra:
        raise MismatchError(
            "the expert has tensors that the base model lacks, and they would be lost",
            where=source.where,
            found=some_of(extra),
            remedy=UNTIE if extra == [head] else "merge adapters first, or use an expert fine-tuned from this base model",
        )


def _plain(value: object) -> object:
    """Equal settings compare equal, such as false and null."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items() if entry is not None}
    return value or False


def check_values(config: Config, family: Family, *, where: str) -> None:
    """Raise SourceError when a setting is missing that every plan needs, or has a value of another kind than its name says.

    For configs of the families with a row: others may call something else by these names.
    """
    where = f"{where}: config.json"
    pair = family.pair
    of_stacks = (key for stack in family.stacks for key in (stack.count[-1], stack.ffn_width))
    for key in (family.width, *of_stacks, "vocab_size", *(() if pair else ("num_attention_heads",))):
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
