"""N-gram routers: which domain's text do the tokens so far look like? Closed form, from token ids alone.

The gate is a table: for every bucket of hashed n-grams and every expert the log-odds that the expert's domain uses it, as
in naive Bayes. The router adds up the rows of a text's n-grams, older ones fading, so that its evidence grows with the
text. No model is run, neither for the fit nor for the decision, which stands before the first layer.

The temperature is chosen on kept documents, each scored with its own counts taken out.

Shape legend: E experts, H buckets, N kept n-grams.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch

from modekit.architecture.modekit_router import causal_average
from modekit.checkpoint.record import RouterRecord
from modekit.errors import TextError
from modekit.loaded.load import load_tokenizer
from modekit.recipes.recipe import Expert, place_of_base
from modekit.recipes.router import Router
from modekit.routing.counts import NgramStatistics, count_domain, load_ngram_statistics, source_of
from modekit.routing.examples import without_text
from modekit.routing.fitting import FittedRouter, Fitting
from modekit.routing.unseen import over_base, room_of, with_unknown
from modekit.text.held_out import fit_documents

_TEMPERATURES = [2.0 ** (step / 2) for step in range(-4, 17)]
_UNCALIBRATED_TEMPERATURE = 8.0  # without a kept document to choose it on


def count_gate(fitting: Fitting) -> FittedRouter:
    """The table of an n-gram router, from kept counts where text and settings are still the same. Raises TextError."""
    settings, experts = fitting.settings, fitting.recipe.experts
    tokenizer = load_tokenizer(fitting.checkpoint.folder, run=fitting.run)
    domains = []
    fitting.run.begin("count n-grams", len(experts))
    for place, expert in enumerate(experts):
        domains.append(_counted(fitting, tokenizer, place, expert))
        fitting.run.progress("count n-grams", place + 1, len(experts))
    (slot,) = fitting.checkpoint.slots
    unseen = None if fitting.recipe.mixture.unseen is None else place_of_base(experts)
    counted = Counted(domains, settings, unseen)
    gate = ngram_gate(counted)
    assert gate.shape == slot.shape
    report: dict[str, Any] = {"tokens": [domain.tokens for domain in domains]}
    text = {e.name: {**domain.source["text"], "tokens": domain.tokens} for e, domain in zip(experts, domains, strict=True)}
    if unseen is not None:
        report["toward_base"] = counted.toward_base
    record = RouterRecord(status="fitted", settings=settings, sha256="", text=text, report=report)
    return FittedRouter([gate.numpy()], record)


def _counted(fitting: Fitting, tokenizer: Any, place: int, expert: Expert) -> NgramStatistics:
    """A domain's counts, kept or made."""
    path = fitting.folder / f"{expert.name}.safetensors"
    kept = load_ngram_statistics(path)
    if kept is not None and len(kept.counts_H) != fitting.settings.buckets:
        kept = None
    asked = source_of([], expert, fitting.settings, tokenizer)["how"]
    known = kept is not None and kept.source.get("how") == asked and isinstance(kept.source.get("text"), dict)
    if kept is not None and known and expert.name in fitting.stays:
        return kept
    try:
        documents = fit_documents(expert, fitting.root, place, reads=fitting.reads)
    except TextError as error:
        if kept is None or not known:
            raise without_text(error, kept and kept.source.get("how"), asked) from None
        return kept  # the text is gone, and its counts are what they would be
    source = source_of(documents, expert, fitting.settings, tokenizer)
    if kept is None or kept.source != source:
        where = f"experts[{place}] '{expert.name}'"
        kept = count_domain(tokenizer, documents, expert, fitting.settings, source, where=where)
        kept.save(path)
    return kept


class Counted:
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
        domain, decay = self.domains[place], self.settings.averages[0]["decay"]
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
        decay, leads = self.settings.averages[0]["decay"], []
        for place in (place for place in range(len(self.domains)) if place != unseen):
            said = [over_base(sums_NE, unseen) for sums_NE in self.sums(place)]
            counted = [
                causal_average(torch.ones(1, len(each), 1), torch.ones(1, len(each)), decay, None, add_up=True)[0]
                for each in said
            ]
            leads.append(torch.cat([each / count[0, :, 0] for each, count in zip(said, counted, strict=True)]))
        return room_of(leads, self.settings.alarms)


def ngram_gate(counted: Counted) -> torch.Tensor:
    """The table (E, H) in float32: log p(bucket | domain), less its mean over domains, by the temperature."""
    gate_EH = counted.logs_EH - counted.logs_EH.mean(0)
    if counted.unseen is not None:
        gate_EH[counted.unseen] += counted.toward_base
    return gate_EH / (_temperature(counted) * counted.settings.temperature)


def _temperature(counted: Counted) -> float:
    """The temperature that gives the domains of kept documents the largest likelihood, each without its own counts.

    Domains count equally. N-grams of one document are no independent evidence, which is why naive Bayes is too sure.
    """
    if any(not domain.lengths for domain in counted.domains):
        return _UNCALIBRATED_TEMPERATURE
    losses = torch.zeros(len(_TEMPERATURES), dtype=torch.float64)
    for place, domain in enumerate(counted.domains):
        for sums_NE in counted.sums(place):
            labels = torch.full((len(sums_NE),), place)
            share = 1.0 / sum(domain.lengths)
            losses += share * torch.tensor(
                [float(torch.nn.functional.cross_entropy(sums_NE / t, labels, reduction="sum")) for t in _TEMPERATURES]
            )
    best: float = _TEMPERATURES[int(losses.argmin())]
    return best
