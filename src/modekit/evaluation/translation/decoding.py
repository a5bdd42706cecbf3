"""How a model with an encoder writes what a source becomes: greedily or by beams, the same for every model.

Sources of similar length share a batch. Pads are masked, so that who shares a batch with whom decides nothing but ties.

Shape legend: B batch, S tokens of a source, W written tokens with what the decoder starts with.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from modekit.files.typed import Count
from modekit.text.sequences import TokenSequence

_OF_THE_MODEL = (
    *("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "forced_bos_token_id"),
    *("forced_eos_token_id", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens"),
)
"""What of a model's generation_config.json is kept: which tokens a translation may have, and where."""


@dataclass(frozen=True)
class Decoding:
    """Of all models alike: beams (1: greedy), sources that are translated together, and tokens of a translation at most."""

    beams: Count = 1
    batch: Count = 16
    max_new_tokens: Count = 256


@dataclass(frozen=True)
class Translations:
    """Translations in the order of their sources; `tokens` were written in `seconds`, and `cut` of them ended at the limit."""

    texts: Sequence[str]
    tokens: int
    seconds: float
    cut: int


def together(parts: Iterable[Translations]) -> Translations:
    """Several as one."""
    every = list(parts)
    texts = [text for part in every for text in part.texts]
    tokens, seconds, cut = (sum(figures) for figures in zip(*((p.tokens, p.seconds, p.cut) for p in every), strict=True))
    return Translations(texts, int(tokens), float(seconds), int(cut))


def first_token(tokenizer: PreTrainedTokenizerBase, pairs: Iterable[TokenSequence]) -> int | None:
    """The special token with which the tokenizer begins every target, such as a language; None where there is none."""
    special = {*tokenizer.all_special_ids} - {tokenizer.eos_token_id, tokenizer.unk_token_id}
    begins = {pair.target[0] for pair in pairs}
    return begins.pop() if len(begins) == 1 and begins <= special else None


def set_decoding(model: PreTrainedModel, decoding: Decoding, begins: int | None) -> bool:
    """Let `generate` write as is said here, whatever the model's own settings are but for its tokens.

    Where they force no first token, `begins` is forced; returns whether it is.
    """
    own: Any = model.generation_config
    kept = {name: getattr(own, name, None) for name in _OF_THE_MODEL}
    forced = kept["forced_bos_token_id"] is None and begins is not None
    if forced:
        kept["forced_bos_token_id"] = begins
    if kept["pad_token_id"] is None:
        kept["pad_token_id"] = _ends(kept["eos_token_id"])[0] if _ends(kept["eos_token_id"]) else 0
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=decoding.beams,
        max_new_tokens=decoding.max_new_tokens,
        min_length=0,
        length_penalty=1.0,
        early_stopping=False,
        no_repeat_ngram_size=0,
        repetition_penalty=1.0,
        num_return_sequences=1,
        **{name: value for name, value in kept.items() if value is not None},
    )
    return forced


def translated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[TokenSequence],
    batch: int,
    advance: Callable[[int], object] = lambda _count: None,
) -> Translations:
    """Translate the sources of pairs, so many at a time; `set_decoding` has said how. `advance` gets how many are done."""
    texts = [""] * len(pairs)
    tokens, cut, seconds = 0, 0, 0.0
    limit = int(model.generation_config.max_new_tokens)
    longest_first = sorted(range(len(pairs)), key=lambda row: (-len(pairs[row].ids), row))
    for start in range(0, len(pairs), batch):
        rows = longest_first[start : start + batch]
        started = time.perf_counter()
        written = list(_written(model, [pairs[row].ids for row in rows]))
        seconds += time.perf_counter() - started
        decoded = tokenizer.batch_decode(written, skip_special_tokens=True)
        for row, ids, text in zip(rows, written, decoded, strict=True):
            texts[row] = text.strip()
            tokens += len(ids)
            cut += len(ids) >= limit
        advance(len(rows))
    return Translations(texts, tokens, seconds, cut)


def _written(model: PreTrainedModel, sources: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """What is written of each source, up to its end token, without what the decoder starts with."""
    settings: Any = model.generation_config
    ids = [torch.tensor(each) for each in sources]
    ids_BS = pad_sequence(ids, batch_first=True, padding_value=settings.pad_token_id)
    mask_BS = pad_sequence([torch.ones_like(each) for each in ids], batch_first=True)
    with torch.inference_mode():
        out_BW: Any = model.generate(
            input_ids=ids_BS.to(model.device), attention_mask=mask_BS.to(model.device), generation_config=settings
        )
    ends = _ends(settings.eos_token_id)
    for row in out_BW[:, 1:].tolist():
        yield row[: next((place + 1 for place, token in enumerate(row) if token in ends), len(row))]


def _ends(said: int | Sequence[int] | None) -> list[int]:
    """End tokens, of which a config says none, one, or several."""
    return [] if said is None else [said] if isinstance(said, int) else list(said)
