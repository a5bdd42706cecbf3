"""N-gram routers: which domain's text do the tokens so far look like? Closed form, from token ids alone.

The gate is a table: for every bucket of hashed n-grams and every expert the log-odds that the expert's domain uses it, as
in naive Bayes. The router adds up the rows of a text's n-grams, older ones fading, so that its evidence grows with the
text. No model is run, neither for the fit nor for the decision, which stands before the first layer.

Counts add up: they are kept per domain (of pairs those of the sources), with a sample of documents on which the temperature is
chosen, each scored with its own counts taken out.

Shape legend: E experts, H buckets, N kept n-grams.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, Field
from transformers import PreTrainedTokenizerBase

from modekit.architecture.modekit_router import causal_average, ngram_rows
from modekit.files.typed import Count, as_kind
from modekit.loaded.load import load_tokenizer
from modekit.recipes.recipe import Expert, place_of_base
from modekit.recipes.router import Router
from modekit.routing.examples import SHARE, chats_of, read_chats
from modekit.routing.fitting import FittedRouter, Fitting
from modekit.routing.kept import Get, Header, Provenance, checked, documents_to_read, load_kept, save_kept
from modekit.routing.unseen import over_base, room_of, with_unknown
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
    source: Provenance

    def save(self, path: Path) -> None:
        """Write atomically."""
        about = {"ngram": True, "lengths": self.lengths, "tokens": self.tokens, "source": self.source}
        save_kept(path, {"counts": self.counts_H, "sample": self.sample_N}, about)


def load_ngram_statistics(path: Path) -> NgramStatistics | None:
    """Read a domain's counts; None when there are none, or only those of another fit. Raises CheckpointError when damaged."""
    return load_kept(path, _checked_counts)


def _checked_counts(get: Get, about: Header) -> NgramStatistics | None:
    if not about.get("ngram"):
        return None
    said = as_kind(about, _CountsHeader)
    counts_H, sample_N = checked(get("counts"), (None,)), checked(get("sample"), (sum(said.lengths),))
    if len(sample_N) and not 0 <= int(sample_N.min()) <= int(sample_N.max()) < len(counts_H):
        raise ValueError("the sample has n-grams of other buckets")
    return NgramStatistics(counts_H, sample_N, said.lengths, said.tokens, said.source)


class _CountsHeader(BaseModel):
    lengths: tuple[Annotated[Count, Field(ge=1)], ...]
    tokens: Annotated[Count, Field(ge=1)]
    source: Provenance


def count_domain(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    expert: Expert,
    settings: Router,
    source: Provenance,
    *,
    where: str,
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
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], expert: Expert, settings: Router
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


def source_of(
    documents: Sequence[Document], expert: Expert, settings: Router, tokenizer: PreTrainedTokenizerBase
) -> Provenance:
    """What counts are made from: text and settings."""
    include = {"sequence_length", "keep_tokens", "order", "buckets"}
    how = {**settings.model_dump(mode="json", include=include), **chats_of(tokenizer, expert, settings)}
    return {"text": text_record(documents, 0), "how": how, "prompts": [digest_of(prompt) for prompt in expert.prompts or []]}


def _rows(sequence: TokenSequence, settings: Router) -> torch.Tensor:
    """Of the n-grams that end where something is said."""
    ids = torch.tensor([sequence.ids])
    return ngram_rows(ids, torch.ones_like(ids), None, settings.order, settings.buckets)[0][0][sequence.start :]


_TEMPERATURES = [2.0 ** (step / 2) for step in range(-4, 17)]
_UNCALIBRATED_TEMPERATURE = 8.0  # without a kept document to choose it on


def count_gate(fitting: Fitting) -> FittedRouter:
    """The table of an n-gram router, from kept counts where text and settings are still the same. Raises TextError."""
    settings, experts = fitting.settings, fitting.recipe.experts
    tokenizer = load_tokenizer(fitting.checkpoint.folder, run=fitting.run)
    domains = []
    fitting.run.begin("count n-grams", len(experts))
    for place in range(len(experts)):
        domains.append(_counted(fitting, tokenizer, place))
        fitting.run.progress("count n-grams", place + 1, len(experts))
    (slot,) = fitting.checkpoint.slots
    unseen = None if fitting.recipe.mixture.unseen is None else place_of_base(experts)
    odds = NgramOdds(domains, settings, unseen)
    gate = ngram_gate(odds)
    assert gate.shape == slot.shape
    report: dict[str, object] = {"tokens": [domain.tokens for domain in domains]}
    if unseen is not None:
        report["toward_base"] = odds.toward_base
    return fitting.fitted([gate.numpy()], [{**each.source["text"], "tokens": each.tokens} for each in domains], report)


def _counted(fitting: Fitting, tokenizer: PreTrainedTokenizerBase, place: int) -> NgramStatistics:
    """A domain's counts, kept or made."""
    expert, settings = fitting.recipe.experts[place], fitting.settings
    path = fitting.statistics_file(expert.name)
    kept = load_ngram_statistics(path)
    if kept is not None and len(kept.counts_H) != settings.buckets:
        kept = None
    how = source_of([], expert, settings, tokenizer)["how"]
    documents = documents_to_read(fitting, place, None if kept is None else kept.source, how)
    source = None if documents is None else source_of(documents, expert, settings, tokenizer)
    if documents is None or source is None or (kept is not None and kept.source == source):
        assert kept is not None
        return kept
    made = count_domain(tokenizer, documents, expert, settings, source, where=f"experts[{place}] '{expert.name}'")
    made.save(path)
    return made


class NgramOdds:
    """The log-probabilities (E, H) of domains, and what they say of kept documents, each scored with its own counts taken out.

    `unseen`: place of the base, which then stands for n-grams that nobody has seen, too.
    """

    def __init__(self, domains: Sequence[NgramStatistics], settings: Router, unseen: int | None = None) -> None:
        self.domains, self.settings, self.unseen = domains, settings, unseen
        self.logs_EH = torch.stack([self._logs(place, each.counts_H, each.tokens) for place, each in enumerate(domains)])

    def _logs(self, place: int, counts: torch.Tensor, tokens: int) -> torch.Tensor:
        smoothing, buckets = self.settings.smoothing, self.settings.buckets
        logs = ((counts + smoothing) / (tokens + smoothing * buckets)).log()
        return logs if place != self.unseen else with_unknown(logs, buckets)

    def sums(self, place: int) -> Iterator[torch.Tensor]:
        """Evidence at every token of each kept document of a domain (N, E), older tokens fading."""
        domain, decay = self.domains[place], self.settings.decays[0]
        for rows in torch.split(domain.sample_N.long(), list(domain.lengths)):
            scores_EN = self.logs_EH[:, rows].clone()
            unique, inverse = torch.unique(rows, return_inverse=True)
            own = torch.bincount(inverse, minlength=len(unique))[inverse]
            scores_EN[place] = self._logs(place, domain.counts_H[rows] - own, domain.tokens - len(rows))
            evidence_NE = (scores_EN - scores_EN.mean(0)).T
            yield causal_average(evidence_NE[None], torch.ones((1, len(rows))), decay, None, add_up=True)[0][0]

    @cached_property
    def toward_base(self) -> float:
        """What each n-gram says for the base besides what was counted, such that domains lose no more to it than they may."""
        unseen = self.unseen
        if unseen is None:
            return 0.0
        decay, leads = self.settings.decays[0], []
        for place in (place for place in range(len(self.domains)) if place != unseen):
            said = [over_base(sums_NE, unseen) for sums_NE in self.sums(place)]
            counted = [
                causal_average(torch.ones(1, len(each), 1), torch.ones(1, len(each)), decay, None, add_up=True)[0]
                for each in said
            ]
            leads.append(torch.cat([each / count[0, :, 0] for each, count in zip(said, counted, strict=True)]))
        return room_of(leads, self.settings.alarms)


def ngram_gate(odds: NgramOdds) -> torch.Tensor:
    """The table (E, H) in float32: log p(bucket | domain), less its mean over domains, by the temperature."""
    gate_EH = odds.logs_EH - odds.logs_EH.mean(0)
    if odds.unseen is not None:
        gate_EH[odds.unseen] += odds.toward_base
    return gate_EH / (_temperature(odds) * odds.settings.temperature)


def _temperature(odds: NgramOdds) -> float:
    """The temperature that gives the domains of kept documents the largest likelihood, each without its own counts.

    Domains count equally. N-grams of one document are no independent evidence, which is why naive Bayes is too sure.
    """
    if any(not domain.lengths for domain in odds.domains):
        return _UNCALIBRATED_TEMPERATURE
    losses = torch.zeros(len(_TEMPERATURES), dtype=torch.float64)
    for place, domain in enumerate(odds.domains):
        for sums_NE in odds.sums(place):
            labels = torch.full((len(sums_NE),), place)
            share = 1.0 / sum(domain.lengths)
            losses += share * torch.tensor(
                [float(torch.nn.functional.cross_entropy(sums_NE / t, labels, reduction="sum")) for t in _TEMPERATURES]
            )
    best: float = _TEMPERATURES[int(losses.argmin())]
    return best
