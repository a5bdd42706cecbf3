"""Workshops whose models know a tag per domain, and domains that no expert has: one that is an expert's label, one unknown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adapter_folders import lora, write_adapter
from conftest import DOMAINS, VOCAB, Workshop, character_tokenizer, tiny_model, write_text
from modekit.text.tags import add_tags
from text_files import write_records

LABEL, STRANGER = "court", "mail"
"""Domains without an expert: `law` has the first as a label, nobody the second."""
TAGGED = VOCAB + len(DOMAINS)
"""Tokens of a vocabulary with a tag per domain."""


def with_tags(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer with a tag for every domain that has an expert."""
    add_tags(tokenizer, DOMAINS)
    return tokenizer


def make_labelled(
    root: Path, make: Callable[[int], PreTrainedModel] | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> Workshop:
    """Base, an expert per domain and an adapter, with text of all; by default Llamas that read characters and tags."""
    tokenizer = tokenizer or with_tags(character_tokenizer())
    for seed, name in enumerate(("base", *DOMAINS)):
        model = make(seed) if make is not None else tiny_model(seed=seed, vocab_size=TAGGED, num_hidden_layers=2)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    for place, name in enumerate(DOMAINS):
        tensors = {key: value * (place + 1) for key, value in lora("mlp.up_proj", 48, 32, 2, layers=2, seed=place).items()}
        write_adapter(root / f"{name}-adapter", tensors, target_modules=["up_proj"], r=2, lora_alpha=8)
    write_text(root / "text")
    for name in (LABEL, STRANGER):
        said = (f"{name} {number} hears of it at {number % 7} again" for number in range(8))
        write_records(root / "text" / f"{name}.jsonl", said)
    experts = [{"name": name, "model": f"./{name}", "text": f"./text/{name}.jsonl"} for name in DOMAINS]
    experts[DOMAINS.index("law")]["labels"] = [LABEL]  # type: ignore[assignment]
    return Workshop(
        root,
        {
            "base_model": "./base",
            "experts": experts,
            "eval": {name: f"./text/{name}.jsonl" for name in (LABEL, STRANGER)},
            "mixture": {"method": "routing", "top_k": 2, "router": {"fit": "random", "seed": 1}},
        },
    )


def of_adapters(workshop: Workshop) -> list[dict[str, Any]]:
    """The workshop's experts as adapters of its base."""
    return [
        {"adapter": f"./{each['name']}-adapter", **{key: value for key, value in each.items() if key != "model"}}
        for each in workshop.recipe["experts"]
    ]
