"""A small byte-level BPE tokenizer, as llama.cpp reads them, and models that have it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from conftest import tiny_model

_WORDS = "the heart moves the blood through the body, and the court hears the parties; return the width, 27 of 4,096 or 81,715 "
_TEXT = _WORDS * 3
_SIZE = 320


@cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """All bytes, a few words, and no pre-tokenizer whose hash llama.cpp's converter knows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_SIZE,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def save_byte_model(folder: Path, model_type: str, seed: int, **overrides: Any) -> None:
    """A small random model that reads bytes."""
    tokenizer = byte_tokenizer()
    length = max(256, overrides.get("max_position_embeddings", 0))
    sizes = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    tiny_model(model_type, seed, **{**overrides, **sizes, "max_position_embeddings": length}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
