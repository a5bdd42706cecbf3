"""Tiny models, adapters and text for the golden checkpoints, with the same bytes on every machine.

No number is drawn by torch and none is computed: weights are the top bits of a PCG64 stream (whose raw output numpy keeps
stable) times a power of two, and the tokenizer is written by hand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file

DOMAINS = ("medicine", "law", "code")
HIDDEN, EXPERT_HIDDEN, HEADS, KEY_VALUE_HEADS, VOCAB = 32, 48, 4, 2, 96
HEAD = HIDDEN // HEADS
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "float32",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": EXPERT_HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_VALUE_HEADS,
    "head_dim": HEAD,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.02,
    "use_cache": True,
}
PROJECTIONS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEY_VALUE_HEADS * HEAD, HIDDEN),
    "self_attn.v_proj": (KEY_VALUE_HEADS * HEAD, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (EXPERT_HIDDEN, HIDDEN),
    "mlp.up_proj": (EXPERT_HIDDEN, HIDDEN),
    "mlp.down_proj": (HIDDEN, EXPERT_HIDDEN),
}
"""Module of a layer -> (outputs, inputs)."""
ADAPTERS: dict[str, dict[str, Any]] = {
    "medicine": {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]},
    "law": {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "code": {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "gate_proj"]},
    "dora": {"r": 2, "lora_alpha": 8, "use_dora": True, "target_modules": ["up_proj", "down_proj"]},
}
_WORDS = {
    "medicine": "fever artery lesion dose nerve renal tumour pulse",
    "law": "licence clause party breach court waiver tort deed",
    "code": "def return self import yield class lambda raise",
}
_Array = np.ndarray[Any, np.dtype[np.float32]]


class _Stream:
    """Uniform numbers in [-1, 1) with 16 bits each, exact in float32."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.PCG64(seed)

    def draw(self, *shape: int, scale: float = 0.5) -> _Array:
        """The next numbers of the stream times a power of two."""
        top = (self._bits.random_raw(int(np.prod(shape))) >> np.uint64(48)).astype(np.int64)
        return np.asarray((top - 2**15) * (scale / 2**15), np.float32).reshape(shape)


def write_sources(folder: Path, layers: int = 2) -> Path:
    """Write base, one full model and one adapter per domain, and text; returns the folder."""
    _write_model(folder / "base", 0, layers)
    for seed, name in enumerate(DOMAINS, 1):
        _write_model(folder / name, seed, layers)
    for seed, (name, settings) in enumerate(ADAPTERS.items(), 11):
        _write_adapter(folder / f"{name}-adapter", seed, settings, layers)
    for domain in DOMAINS:
        _write_text(folder / "text" / f"{domain}.jsonl", domain)
    return folder


def write_yaml(path: Path, recipe: dict[str, Any]) -> Path:
    """Write a recipe."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _write_model(folder: Path, seed: int, layers: int) -> None:
    """A model whose every tensor is its own, norms included, so that a lost or swapped one shows."""
    stream, tensors = _Stream(seed), {}
    tensors["model.embed_tokens.weight"] = stream.draw(VOCAB, HIDDEN)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for module, shape in PROJECTIONS.items():
            tensors[f"{prefix}{module}.weight"] = stream.draw(*shape)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = 1 + stream.draw(HIDDEN, scale=0.125)
    tensors["model.norm.weight"] = 1 + stream.draw(HIDDEN, scale=0.125)
    tensors["lm_head.weight"] = stream.draw(VOCAB, HIDDEN)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", {**CONFIG, "num_hidden_layers": layers})
    _write_tokenizer(folder)


def _write_tokenizer(folder: Path) -> None:
    """One token per printable character."""
    special = ("<pad>", "<s>", "</s>", "<unk>")
    vocab = {token: place for place, token in enumerate((*special, *map(chr, range(32, 32 + VOCAB - len(special)))))}
    added = [
        {
            "id": place,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for place, token in enumerate(special)
    ]
    _write_json(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": {"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": False},
            "post_processor": None,
            "decoder": None,
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
        },
    )
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": "<pad>",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "model_max_length": 128,
        },
    )


def _write_adapter(folder: Path, seed: int, settings: dict[str, Any], layers: int) -> None:
    stream, tensors, rank = _Stream(seed), {}, settings["r"]
    for layer in range(layers):
        for module, (outputs, inputs) in PROJECTIONS.items():
            if module.partition(".")[2] not in settings["target_modules"]:
                continue
            name = f"base_model.model.model.layers.{layer}.{module}."
            tensors[name + "lora_A.weight"] = stream.draw(rank, inputs)
            tensors[name + "lora_B.weight"] = stream.draw(outputs, rank)
            if settings.get("use_dora"):
                tensors[name + "lora_magnitude_vector"] = 2 + stream.draw(outputs)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    _write_json(
        folder / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "../base",
            "bias": "none",
            **settings,
        },
    )


def _write_text(path: Path, domain: str, documents: int = 40) -> None:
    words = _WORDS[domain].split()
    lines = []
    for number in range(documents):
        picked = [words[(number * 7 + place * (number % 5 + 1)) % len(words)] for place in range(8)]
        lines.append(json.dumps({"text": f"{number} " + " ".join(picked)}))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
