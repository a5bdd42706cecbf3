"""A workshop whose tokenizer knows words and chats: three domains, and the base as an expert for everything else."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conftest import _WORDS, DOMAINS, Workshop, make_workshop
from modekit.text.shipped import QUESTION_FRAMES, SMALL_TALK, SYSTEM_PROMPTS

TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou help with court and fever<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Its own system prompt has words of two domains: a router that takes them for the text's goes wrong."""
_COMMON = "the of and in is a to it with for on as by that what does mean one more thing when where every how"
_GENERAL = "table river walk bread window morning horse garden paper yellow"


def word_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A token per word of the texts and of what is said in chats."""
    frames = [frame.replace("{}", " ") for frames in QUESTION_FRAMES.values() for frame in frames]
    asked = [*SMALL_TALK, *SYSTEM_PROMPTS, *frames]
    said = " ".join([*_WORDS.values(), _COMMON, _GENERAL, *asked, "system user assistant"])
    split = pre_tokenizers.Whitespace()
    words = dict.fromkeys(word for word, _ in split.pre_tokenize_str(f"{said} You help with court and fever"))
    special = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate([*special, *words])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    made.chat_template = template
    return made


def documents_of(words: str, count: int = 80) -> list[str]:
    """Words of a domain among those that all texts have."""
    own, common = words.split(), _COMMON.split()
    return [
        " ".join(
            (own if (number + place) % 3 == 0 else common)[(number * 7 + place * (number % 5 + 1)) % 8] for place in range(40)
        )
        + f" {number}"
        for number in range(count)
    ]


def make_chat_workshop(root: Path) -> Workshop:
    """Base and one expert per domain, and the base itself with general text."""
    tokenizer = word_tokenizer()
    workshop = make_workshop(
        root,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        hidden_size=128,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    for name in ("base", *DOMAINS):
        tokenizer.save_pretrained(root / name)
    for name, words in {**_WORDS, "general": _GENERAL}.items():
        lines = [json.dumps({"text": document}) for document in documents_of(words)]
        (root / "text" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    workshop.recipe["experts"].append({"name": "general", "model": "base", "text": "./text/general.jsonl"})
    workshop.recipe["mixture"] = {"method": "routing", "top_k": 1, "router": {"fit": "lexical"}}
    workshop.recipe["output"] = {"format": "plain"}
    return workshop
