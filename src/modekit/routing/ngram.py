"""N-gram routers: which domain's text do the tokens so far look like? Closed form, from token ids alone.

The gate is a table: for every bucket of hashed n-grams and every expert the log-odds that the expert's domain uses it, as
in naive Bayes. The router adds up the rows of a text's n-grams, older ones fading, so that its evidence grows with the
text. No model is run, neither for the fit nor for the decision, which stands before the first layer.

Counts add up: they are kept per domain, with a sample of documents on which the temperature is chosen, each scored with its
own counts taken out.

Shape legend: E experts, H buckets, N kept n-grams.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from modekit.architecture.modekit_router import causal_average, ngram_rows
from modekit.errors import CheckpointError, TextError
from modekit.recipes.recipe import Expert, Router
from modekit.text.sequences import TokenSequence, encode
from modekit.text.splits import digest_of, text_record

_MOST_TOKENS = 2**26  # counted per domain: a million takes seconds, and more hardly changes the odds
_TEMPERATURES = [2.0 ** (step / 2) for step in range(-4, 17)]
_UNCALIBRATED_TEMPERATURE = 8.0  # without a kept document to choose it on


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
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        about = {"ngram": True, "lengths": self.lengths, "tokens": self.tokens, "source": self.source}
        tensors = {"counts": self.counts_H.contiguous(), "sample": self.sample_N.contiguous()}
        save_file(tensors, partial, metadata={"about": json.dumps(about, sort_keys=True)})
        partial.replace(path)


def load_ngram_statistics(path: Path) -> NgramStatistics | None:
    """Read a domain's counts; None when there are none, or only those of another fit. Raises CheckpointError when damaged."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["about"])
            if not about.get("ngram"):
                return None
            counts, sample = file.get_tensor("counts"), file.get_tensor("sample")
            return NgramStatistics(counts, sample, tuple(about["lengths"]), int(about["tokens"]), about["source"])
    except Exception as error:  # safetensors raises its own type, wrong shapes raise others
        raise CheckpointError(
            "the kept statistics are damaged", where=str(path), found=error,
            remedy="delete the file and run `modekit fit` with the text at hand",
        ) from None  # fmt: skip


def count_domain(
    tokenizer: Any, documents: Sequence[str], settings: Router, source: dict[str, Any], *, where: str
) -> NgramStatistics:
    """Count a domain's n-grams. Raises TextError when the text has none."""
    counts_H = torch.zeros(settings.buckets)
    sample: list[torch.Tensor] = []
    kept = tokens = 0
    for document in documents:
        sequences = encode(tokenizer, [document], max_tokens=_MOST_TOKENS - tokens, sequence_length=settings.sequence_length)
        if not sequences:
            continue
        rows = torch.cat([_rows(sequence, settings) for sequence in sequences])
        counts_H += torch.bincount(rows, minlength=settings.buckets)
        tokens += len(rows)
        if kept + len(rows) <= settings.keep_tokens or not sample:
            sample.append(rows[: settings.keep_tokens].int())
            kept += len(sample[-1])
        if tokens >= _MOST_TOKENS - 1:
            break
    if not tokens:
        raise TextError("the text is shorter than two tokens", where=where, remedy="give more text")
    rows_N = torch.cat(sample) if sample else torch.empty(0, dtype=torch.int32)
    return NgramStatistics(counts_H, rows_N, tuple(len(rows) for rows in sample), tokens, source)


def source_of(documents: Sequence[str], expert: Expert, settings: Router) -> dict[str, Any]:
    """What counts are made from: text and settings."""
    include = {"sequence_length", "keep_tokens", "order", "buckets"}
    how = settings.model_dump(mode="json", include=include)
    return {"text": text_record(documents, 0), "how": how, "prompts": [digest_of(prompt) for prompt in expert.prompts or []]}


def _rows(sequence: TokenSequence, settings: Router) -> torch.Tensor:
    ids = torch.tensor([sequence.ids])
    return ngram_rows(ids, torch.ones_like(ids), None, settings.order, settings.buckets)[0][0]


def ngram_gate(domains: Sequence[NgramStatistics], settings: Router) -> torch.Tensor:
    """The table (E, H) in float32: log p(bucket | domain), less its mean over domains, by the temperature."""
    logs_EH = torch.stack([_log_probability(domain.counts_H, domain.tokens, settings) for domain in domains])
    temperature = _temperature(domains, logs_EH, settings)
    return (logs_EH - logs_EH.mean(0)) / (temperature * settings.temperature)


def _log_probability(counts: torch.Tensor, tokens: int, settings: Router) -> torch.Tensor:
    smoothing = settings.smoothing
    return ((counts + smoothing) / (tokens + smoothing * settings.buckets)).log()


def _temperature(domains: Sequence[NgramStatistics], logs_EH: torch.Tensor, settings: Router) -> float:
    """The temperature that gives the domains of kept documents the largest likelihood, each without its own counts.

    Domains count equally. N-grams of one document are no independent evidence, which is why naive Bayes is too sure.
    """
    if any(not domain.lengths for domain in domains):
        return _UNCALIBRATED_TEMPERATURE
    decay = settings.averages[0]["decay"]
    losses = torch.zeros(len(_TEMPERATURES), dtype=torch.float64)
    for place, domain in enumerate(domains):
        for rows in torch.split(domain.sample_N.long(), list(domain.lengths)):
            scores_EN = logs_EH[:, rows].clone()
            unique, inverse = torch.unique(rows, return_inverse=True)
            own = torch.bincount(inverse, minlength=len(unique))[inverse]
            scores_EN[place] = _log_probability(domain.counts_H[rows] - own, domain.tokens - len(rows), settings)
            evidence_NE = (scores_EN - scores_EN.mean(0)).T
            sums_NE = causal_average(evidence_NE[None], torch.ones((1, len(rows))), decay, None, add_up=True)[0][0]
            labels = torch.full((len(rows),), place)
            share = 1.0 / sum(domain.lengths)
            losses += share * torch.tensor(
                [float(torch.nn.functional.cross_entropy(sums_NE / t, labels, reduction="sum")) for t in _TEMPERATURES]
            )
    best: float = _TEMPERATURES[int(losses.argmin())]
    return best
