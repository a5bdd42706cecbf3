"""Tiny random models with an encoder, one of each family, and pairs that they read with the test tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import processors
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedModel, PreTrainedTokenizerFast

from conftest import DOMAINS, VOCAB, Workshop, character_tokenizer
from modekit.building.build import build
from modekit.planning.make import make_plan
from modekit.planning.plan import Plan
from modekit.recipes.read import parse_recipe
from modekit.text.document import Pair
from text_files import write_records

_BART: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "dropout": 0.0,
}
PAIR_FAMILIES: dict[str, dict[str, Any]] = {
    "bart": _BART,
    "mbart": _BART,
    "marian": {**_BART, "decoder_start_token_id": 0, "decoder_vocab_size": VOCAB},
    "m2m_100": _BART,
    "t5": {
        "vocab_size": VOCAB,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 16,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "decoder_start_token_id": 0,
        "dropout_rate": 0.0,
    },
}
"""Model type -> sizes."""


def pair_model(model_type: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A small random model, whose weights are so large that every token matters."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**PAIR_FAMILIES[model_type], **overrides})
    model: PreTrainedModel = AutoModelForSeq2SeqLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name and "shared" not in name:
                parameter.mul_(3.0)
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def pair_tokenizer() -> PreTrainedTokenizerFast:
    """The test tokenizer, with an end token behind every text."""
    tokenizer = character_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    return tokenizer


def pairs(count: int) -> list[Pair]:
    """Words, and the same words in capitals; all different, of different lengths."""
    words = ["fever", "artery", "lesion", "dose", "nerve", "renal", "tumour", "pulse"]
    said = (" ".join(words[(number + place) % 8] for place in range(1 + number % 4)) for number in range(count))
    return [Pair(f"{number} {text}", f"{text.upper()} {number % 7}") for number, text in enumerate(said)]


def make_pair_workshop(root: Path, model_type: str) -> Workshop:
    """Base and one expert per domain, random and different in every tensor, with pairs of each domain."""
    for seed, name in enumerate(("base", *DOMAINS)):
        pair_model(model_type, seed=seed).save_pretrained(root / name)
        pair_tokenizer().save_pretrained(root / name)
    experts = []
    for place, name in enumerate(DOMAINS):
        said = [Pair(f"{name} {pair.source}", f"{pair.target} {place}") for pair in pairs(60)]
        experts.append({"name": name, "model": f"./{name}", "text": write_records(root / f"{name}.jsonl", said)})
    return Workshop(root, {"base_model": "./base", "experts": experts})


def say(folder: Path, file: str = "config.json", **settings: Any) -> None:
    """Settings that a model's file has from now on; `...` leaves one out."""
    path = folder / file
    said = {**(json.loads(path.read_text()) if path.exists() else {}), **settings}
    path.write_text(json.dumps({key: value for key, value in said.items() if value is not ...}))


def planned(root: Path, mixture: dict[str, Any], *experts: dict[str, Any] | str) -> Plan:
    """Of the base model of a folder and full models there, by name, or other experts."""
    said = [{"name": each, "model": f"./{each}"} if isinstance(each, str) else each for each in experts]
    mixture = {"method": "routing", "top_k": 1, "router": {"fit": "random", "seed": 3}, **mixture}
    mixture = {key: value for key, value in mixture.items() if value is not ...}  # as in `say`
    return make_plan(parse_recipe({"base_model": "./base", "experts": said, "mixture": mixture}, where="test"), root)


def built(root: Path, mixture: dict[str, Any], *experts: dict[str, Any] | str) -> Path:
    """The same, as a checkpoint."""
    build(planned(root, mixture, *experts), root / "out", overwrite=True)
    return root / "out"


def write_models(root: Path, family: str) -> Path:
    """A base and two full models, in folders of these names."""
    for seed, name in enumerate(("base", "one", "two")):
        pair_model(family, seed).save_pretrained(root / name)
    pair_tokenizer().save_pretrained(root / "base")
    return root


def inputs(pads: str = "right", lengths: tuple[int, ...] = (9, 6, 3)) -> dict[str, torch.Tensor]:
    """Sources of different lengths and what is written of their targets."""
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(3, VOCAB, (len(lengths), 9), generator=draw)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        real = ids[row, :length].clone()
        ids[row], mask[row] = 0, 0
        place = slice(0, length) if pads == "right" else slice(9 - length, 9)
        ids[row, place], mask[row, place] = real, 1
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": torch.randint(3, VOCAB, (len(lengths), 5), generator=draw),
    }


def logits_of(model: Any, said: dict[str, torch.Tensor]) -> torch.Tensor:
    """(B, T, V)."""
    with torch.inference_mode():
        logits: torch.Tensor = model(**said).logits
    return logits


def written(model: Any, said: dict[str, torch.Tensor], **how: Any) -> torch.Tensor:
    """What generate makes of the sources."""
    source = {name: said[name] for name in ("input_ids", "attention_mask")}
    ids: torch.Tensor = model.generate(**source, max_new_tokens=7, eos_token_id=None, forced_eos_token_id=None, **how)
    return ids
