"""Dense families of pairs: an encoder reads a source, a decoder writes its target (translation models). A row of data each.

All of them are mixed in the modekit architecture. In Bart and its like no module holds the FFN: the layer calls `fc1`, the
activation and `fc2` itself, so that a mixture of whole FFNs puts all three into one (`Chain` of architecture/modekit_mixed.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from modekit.errors import MismatchError
from modekit.sources.config import Config, read_beside
from modekit.sources.family import Family
from modekit.sources.stack import Stack

if TYPE_CHECKING:
    from modekit.sources.source import ModelSource

PAIR_CLASS = "ModekitForSeq2SeqLM"
"""What config.json of a mixture of one of them calls its class."""
_WITHOUT_VLLM = "modekit's plug-in for vLLM serves models of one stack, and this one has an encoder"
_SELF = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.out_proj"}
_CROSS = {f"cross_{part}": path.replace("self_attn", "encoder_attn") for part, path in _SELF.items()}
_BART_KEYS = ("vocab_size", "max_position_embeddings")
_LEARNED = "embed_positions.weight"
_SINUSOIDS = tuple(f"model.{stack}coder.embed_positions.{name}" for stack in ("en", "de") for name in ("weight", "weights"))


def _bart(model_type: str, *outside: str, **says: object) -> Family:
    """A family whose layers are Bart's. `outside`: what encoder and decoder have besides them; `says`: other defaults."""
    stacks = tuple(
        Stack(
            name=name,
            layers=f"model.{name}.layers.",
            count=(f"{name}_layers",),
            ffn="fc1",
            parts={**_SELF, **(_CROSS if name == "decoder" else {}), "up": "fc1", "down": "fc2"},
            ffn_width=f"{name}_ffn_dim",
            ffn_calls=("fc1", "activation_fn", "fc2"),
            outside=tuple(f"model.{name}.{each}" for each in outside),
        )
        for name in ("encoder", "decoder")
    )
    return Family(
        model_type,
        stacks,
        without_vllm=_WITHOUT_VLLM,
        width="d_model",
        embedding="model.shared",
        defaults={
            "tie_word_embeddings": True,
            "activation_function": "gelu",
            "scale_embedding": False,
            "max_position_embeddings": 1024,
            **says,
        },
        copies=("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"),
        must_match=_BART_KEYS,
        computed=() if _LEARNED in outside else _SINUSOIDS,
        optional=("final_logits_bias",),
        same_as={"decoder_vocab_size": "vocab_size"},
    )


def _t5(gated: bool) -> Family:
    """T5 as it was, with one matrix before the activation, or `gated` as from version 1.1 on (Flan-T5), with two."""
    ffn = {"gate": "wi_0", "up": "wi_1", "down": "wo"} if gated else {"up": "wi", "down": "wo"}
    stacks = []
    for name, place, count in (("encoder", 1, ("num_layers",)), ("decoder", 2, ("num_decoder_layers", "num_layers"))):
        parts = {part: f"layer.0.SelfAttention.{part}" for part in "qkvo"}
        if name == "decoder":
            parts |= {f"cross_{part}": f"layer.1.EncDecAttention.{part}" for part in "qkvo"}
        parts |= {part: f"layer.{place}.DenseReluDense.{each}" for part, each in ffn.items()}
        stacks.append(
            Stack(
                name=name,
                layers=f"{name}.block.",
                count=count,
                parts=parts,
                ffn=f"layer.{place}.DenseReluDense",
                ffn_width="d_ff",
                first=("layer.0.SelfAttention.relative_attention_bias.weight",),
                outside=(f"{name}.final_layer_norm.weight",),
            )
        )
    return Family(
        "t5",
        tuple(stacks),
        variant="gated" if gated else "",
        is_variant=lambda config: str(config.get("feed_forward_proj")).startswith("gated") == gated,
        without_vllm=_WITHOUT_VLLM,
        width="d_model",
        embedding="shared",
        defaults={
            "feed_forward_proj": "relu",
            "layer_norm_epsilon": 1e-6,
            "relative_attention_num_buckets": 32,
            "relative_attention_max_distance": 128,
            "tie_word_embeddings": True,
        },
        same_as={"num_decoder_layers": "num_layers"},
        copies=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
        shares=True,
        must_match=("vocab_size", "scale_decoder_outputs", "dense_act_fn"),
        meant=_t5_meant,
    )


def _t5_meant(config: Config) -> Config:
    """T5 scales what its head reads unless embedding and head are two, which transformers 5 says by a key of its own, and then
    calls them one whatever they are; the activation is the last part of `feed_forward_proj`, or a key of its own.
    """
    kind = config.get("feed_forward_proj") or "relu"
    act = "gelu_new" if kind == "gated-gelu" else str(kind).rpartition("-")[2]
    scales = config.get("scale_decoder_outputs", config.get("tie_word_embeddings") is not False)
    return {
        **config,
        "dense_act_fn": config.get("dense_act_fn") or act,
        "scale_decoder_outputs": scales,
        "tie_word_embeddings": True,
    }


_NORM_BEFORE = ("layernorm_embedding.weight", "layernorm_embedding.bias")
_NORM_BEHIND = ("layer_norm.weight", "layer_norm.bias")

PAIRS: tuple[Family, ...] = (
    _bart("bart", _LEARNED, *_NORM_BEFORE),
    _bart("mbart", _LEARNED, *_NORM_BEFORE, *_NORM_BEHIND),
    _bart("marian", share_encoder_decoder_embeddings=True),
    replace(
        _bart("m2m_100", *_NORM_BEHIND, activation_function="relu", scale_embedding=True),
        must_match=(*_BART_KEYS, "pad_token_id"),
        meant=lambda config: {"pad_token_id": 1, **config},  # positions count from it on
    ),
    _t5(gated=False),
    _t5(gated=True),
)


def check_same_target(sources: Sequence[ModelSource]) -> None:
    """Raise MismatchError where models that write a target were made for other languages: they begin it with another token.

    What a model's files leave unsaid is taken to be as the others have it.
    """
    said: dict[str, tuple[ModelSource, object]] = {}
    for source in dict.fromkeys(sources):
        files = [read_beside(source.folder, file) for file in ("generation_config.json", "config.json")]
        for key in ("decoder_start_token_id", "forced_bos_token_id"):
            value = next((file[key] for file in files if file.get(key) is not None), None)
            first, expected = said.setdefault(key, (source, value)) if value is not None else (source, None)
            if value != expected:
                raise MismatchError(
                    "two models begin what they write with another token: they were made for other languages",
                    where=f"{source.where}: {key}",
                    found=value,
                    expected=f"{expected}, as {first.where} has it",
                    remedy="use experts that write the same language, or correct generation_config.json if only it differs",
                )
