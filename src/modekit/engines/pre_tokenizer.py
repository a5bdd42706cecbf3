"""The name that llama.cpp has for how a tokenizer cuts text into words before its merges.

The converter knows tokenizers by a hash of what they make of one text; one that somebody trained has a hash of its own. Its
tokenizer.json says how it cuts; for the common ways the name follows from that. Whether it is right is proven by tokens
(proof.py), never assumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modekit.files.read import UNREADABLE, read_json

_GPT2 = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
_LLAMA3 = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}"
    "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
_BY_PATTERN = {_GPT2: "gpt-2", _LLAMA3: "llama-bpe", _LLAMA3.replace("{1,3}", ""): "qwen2"}


def guessed_pre_tokenizer(folder: Path) -> str | None:
    """The name that follows from a tokenizer.json; None when it cuts in no way that is known here."""
    try:
        content = read_json(folder / "tokenizer.json")
        if content["model"]["type"] != "BPE":
            return None
        steps = _steps(content.get("pre_tokenizer") or {})
        return _name_of(steps)
    except (*UNREADABLE, KeyError, TypeError, AttributeError):
        return None


def _steps(step: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list(step["pretokenizers"]) if step["type"] == "Sequence" else [step]


def _name_of(steps: list[Mapping[str, Any]]) -> str | None:
    *before, last = steps
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if not last.get("use_regex", True):
        patterns = [step["pattern"]["Regex"] for step in before if step["type"] == "Split"]
        return _BY_PATTERN.get(patterns[0]) if len(patterns) == len(before) == 1 else None
    if not before:
        return "gpt-2"
    digits = len(before) == 1 and before[0]["type"] == "Digits" and before[0].get("individual_digits")
    return "smollm" if digits else None
