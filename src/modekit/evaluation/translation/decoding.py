"""How a model with an encoder writes what a source becomes: greedily or by beams, the same for every model.

Sources of similar length share a batch. Pads are masked, so that who shares a batch with whom decides nothing but ties.

Shape legend: B batch, S tokens of a source, W written tokens with what the decoder starts with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modekit.evaluation.loss import Advance
from modekit.files.typed import Count
from modekit.text.sequences import TokenSequence

_NEUTRAL: dict[str, Any] = {
    "do_sample": False,
    "min_length": 0,
    "min_new_tokens": None,
    "length_penalty": 1.0,
    "early_stopping": False,
    "no_repeat_ngram_size": 0,
    "repetition_penalty": 1.0,
    "num_return_sequences": 1,
}
"""In place of what generation_config.json says; which tokens a translation may have, and where, stays as it says."""


@dataclass(frozen=True)
class Decoding:
    """Of all models alike: beams (1: greedy), sources that are translated together, and tokens of a translation at most."""

    beams: Count = 1
    batch: Count = 16
    max_new_tokens: Count = 256


def first_token(tokenizer: PreTrainedTokenizerBase, pairs: Iterable[TokenSequence]) -> int | None:
    """The special token with which the tokenizer begins every target, such as a language; None where there is none."""
    special = {*tokenizer.all_special_ids} - {tokenizer.eos_token_id, tokenizer.unk_token_id}
    begins = {pair.target[0] for pair in pairs}
    return begins.pop() if len(begins) == 1 and begins <= special else None


def translated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[TokenSequence],
    decoding: Decoding,
    *,
    begins: int | None = None,
    advance: Advance = lambda _count: None,
) -> list[str]:
    """Translate the sources of pairs. `begins` is the first token, where the model's own settings force none; `advance` gets
    how many tokens the targets have of what is done.
    """
    texts = [""] * len(pairs)
    own: Any = model.generation_config
    settings = {**_NEUTRAL, "num_beams": decoding.beams, "max_new_tokens": decoding.max_new_tokens}
    if own.forced_bos_token_id is None and begins is not None:
        settings["forced_bos_token_id"] = begins
    longest_first = sorted(range(len(pairs)), key=lambda row: (-len(pairs[row].ids), row))
    for start in range(0, len(pairs), decoding.batch):
        rows = longest_first[start : start + decoding.batch]
        ids = [torch.tensor(pairs[row].ids) for row in rows]
        ids_BS = pad_sequence(ids, batch_first=True, padding_value=own.pad_token_id or 0).to(model.device)
        mask_BS = pad_sequence([torch.ones_like(each) for each in ids], batch_first=True).to(model.device)
        with torch.inference_mode():
            out_BW: Any = model.generate(input_ids=ids_BS, attention_mask=mask_BS, **settings)
        for row, text in zip(rows, tokenizer.batch_decode(out_BW[:, 1:], skip_special_tokens=True), strict=True):
            texts[row] = text.strip()
        advance(sum(pairs[row].scored for row in rows))
    return texts
