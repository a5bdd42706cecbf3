"""What the studies of this folder share: losses of a model, the gap closed, the mean with its spread."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from modekit.evaluation.domains import Domain, score_domain
from modekit.text.sequences import make_batches

EVAL_TOKENS = 16_384
Losses = dict[str, list[torch.Tensor]]
"""Domain -> loss of every predicted token, per text."""


def losses_of(model: PreTrainedModel, domains: Sequence[Domain]) -> Losses:
    """Of each domain, in nats."""
    losses: Losses = {}
    with torch.inference_mode():
        for domain in domains:
            losses[domain.name] = []
            for batch in make_batches(domain.sequences):
                logits = model(input_ids=batch.input_ids, attention_mask=batch.mask.long(), use_cache=False).logits[:, :-1]
                rows = torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), batch.input_ids[:, 1:].flatten(), reduction="none"
                )
                lengths = batch.mask.sum(1).tolist()
                losses[domain.name] += [
                    row[: length - 1] for row, length in zip(rows.view(logits.shape[:2]), lengths, strict=True)
                ]
    return losses


def mean_losses(model: PreTrainedModel, domains: Sequence[Domain]) -> dict[str, float]:
    """Domain -> mean loss of its tokens, in nats."""
    return {domain.name: score_domain(model, domain, lambda _: None).loss for domain in domains}


def total(texts: Sequence[torch.Tensor]) -> float:
    """Sum over the tokens of all texts, in nats."""
    return float(sum(text.double().sum() for text in texts))


def gaps_closed(base: Losses, own: Losses, found: Losses) -> Mapping[str, float]:
    """Domain -> (base - found) / (base - own), for those that have an expert of their own."""
    return {each: (total(base[each]) - total(found[each])) / (total(base[each]) - total(own[each])) for each in own}


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The mean, and the largest deviation from it where there are several."""
    mean = statistics.fmean(values)
    return f"{mean:.{digits}f}" + (f" ± {max(abs(value - mean) for value in values):.{digits}f}" if len(values) > 1 else "")
