"""N-grams of a domain, counted: what an n-gram router is made from. Of pairs those of the sources.

Counts add up: they are kept per domain, with a sample of documents on which the temperature is chosen.

Shape legend: H buckets, N kept n-grams.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field

from modekit.architecture.modekit_router import ngram_rows
from modekit.files.typed import Count, as_kind
from modekit.recipes.recipe import Expert
from modekit.recipes.router import Router
from modekit.routing.examples import SHARE, chats_of, read_chats
from modekit.routing.kept import Get, checked, load_kept, save_kept
from modekit.text.document import Document
from modekit.text.sequences import TokenSequence, encode, none_fits
from modekit.text.splits import digest_of, text_record

_MOST_TOKENS = 2**26  # counted per domain: a million takes seconds, and more hardly changes the odds


@dataclass(frozen=True)
class NgramStatistics:
    """Of one domain.

    Attributes:
        counts_H: how often an n-gram of each bucket occurred, float32.
        sample_N: buckets of the n-grams of documents (the beginning of one that is too long), one after the other, int32.
        lengths: n-grams of each kept document.
        tokens: n-grams counted.
        source: what they were made from: settings and a digest of the text.
    """

    counts_H: torch.Tensor
    sample_N: torch.Tensor
    lengths: tuple[int, ...]
    tokens: int
    source: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write atomically."""
        about = {"ngram": True, "lengths": self.lengths, "tokens": self.tokens, "source": self.source}
        save_kept(path, {"counts": self.counts_H, "sample": self.sample_N}, about)


def load_ngram_statistics(path: Path) -> NgramStatistics | None:
    """Read a domain's counts; None when there are none, or only those of another fit. Raises CheckpointError when damaged."""
    return load_kept(path, _statistics)


def _statistics(get: Get, about: dict[str, Any]) -> NgramStatistics | None:
    if not about.get("ngram"):
        return None
    said = as_kind(about, _About)
    counts_H, sample_N = checked(get("counts"), (None,)), checked(get("sample"), (sum(said.lengths),))
    if len(sample_N) and not 0 <= int(sample_N.min()) <= int(sample_N.max()) < len(counts_H):
        raise ValueError("the sample has n-grams of other buckets")
    return NgramStatistics(counts_H, sample_N, said.lengths, said.tokens, said.source)


class _About(BaseModel):
    lengths: tuple[Annotated[Count, Field(ge=1)], ...]
    tokens: Annotated[Count, Field(ge=1)]
    source: dict[str, Any]


def count_domain(
    tokenizer: Any, documents: Sequence[Document], expert: Expert, settings: Router, source: dict[str, Any], *, where: str
) -> NgramStatistics:
    """Count a domain's n-grams. Raises TextError when the text has none."""
    counts_H = torch.zeros(settings.buckets)
    sample: list[torch.Tensor] = []
    kept = tokens = 0
    for sequences in _texts(tokenizer, documents, expert, settings):
        rows = torch.cat([_rows(sequence, settings) for sequence in sequences])
        counts_H += torch.bincount(rows, minlength=settings.buckets)
        tokens += len(rows)
        if kept + len(rows) <= settings.keep_tokens or (settings.keep_tokens and not sample):
            sample.append(rows[: settings.keep_tokens].int())
            kept += len(sample[-1])
        if tokens >= _MOST_TOKENS - 1:
            break
    if not tokens:
        raise none_fits(documents, settings.sequence_length, where=where)
    rows_N = torch.cat(sample) if sample else torch.empty(0, dtype=torch.int32)
    return NgramStatistics(counts_H, rows_N, tuple(len(rows) for rows in sample), tokens, source)


def _texts(
    tokenizer: Any, documents: Sequence[Document], expert: Expert, settings: Router
) -> Iterator[Sequence[TokenSequence]]:
    """The sequences of every document, and every chat."""
    found = tokens = 0
    for document in documents:
        sequences = encode(tokenizer, [document], max_tokens=_MOST_TOKENS - tokens, sequence_length=settings.sequence_length)
        if sequences:
            yield sequences
        found, tokens = found + len(sequences), tokens + sum(sequence.size for sequence in sequences)
    for chat in read_chats(tokenizer, documents, expert, settings, found, most=tokens // (SHARE - 1)):
        yield [chat]


def source_of(documents: Sequence[Document], expert: Expert, settings: Router, tokenizer: Any) -> dict[str, Any]:
    """What counts are made from: text and settings."""
    include = {"sequence_length", "keep_tokens", "order", "buckets"}
    how = {**settings.model_dump(mode="json", include=include), **chats_of(tokenizer, expert, settings)}
    return {"text": text_record(documents, 0), "how": how, "prompts": [digest_of(prompt) for prompt in expert.prompts or []]}


def _rows(sequence: TokenSequence, settings: Router) -> torch.Tensor:
    """Of the n-grams that end where something is said."""
    ids = torch.tensor([sequence.ids])
    return ngram_rows(ids, torch.ones_like(ids), None, settings.order, settings.buckets)[0][0][sequence.start :]
