"""How well a router that reads tokens tells text of no domain from that of the domains: running scores, without any model.

Shape legend: S sequence, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.evaluation.domains import Domain
from modekit.evaluation.inspection.result import UnseenDetection
from modekit.recipes.recipe import place_of_base
from modekit.routing.text_router import RunningLogits, reads_tokens
from modekit.routing.unseen import DECIDES, SCORES, running_scores
from modekit.text.sequences import TokenSequence

AT = (32, 64, 128, 256)
"""Tokens after which a score is read."""


def scores_of(checkpoint: Checkpoint, sequences: Sequence[TokenSequence]) -> list[dict[str, torch.Tensor]]:
    """Per sequence the scores (S,) after each of its tokens, by name; none where the router reads more than tokens."""
    if not reads_tokens(checkpoint):
        return []
    logits, base = RunningLogits(checkpoint), place_of_base(checkpoint.record.recipe.experts)
    return [dict(running_scores(logits(sequence.ids), base)) for sequence in sequences]


def detect_unseen(checkpoint: Checkpoint, domains: Sequence[Domain]) -> UnseenDetection | None:
    """AUROC of the domains' text against that of each unseen domain, and where the base leads; None where the router reads more
    than tokens, and of pairs, where it decides by the whole source.

    A domain whose expert is the base is neither seen nor unseen.
    """
    if not reads_tokens(checkpoint) or any(sequence.target for domain in domains for sequence in domain.sequences):
        return None
    experts = checkpoint.record.recipe.experts
    found = {domain.name: scores_of(checkpoint, domain.sequences) for domain in domains}
    seen = [
        each
        for domain in domains
        if domain.expert is not None and not experts[domain.expert].is_base
        for each in found[domain.name]
    ]
    decides = place_of_base(experts) is not None
    names = SCORES if decides else [name for name in SCORES if name != DECIDES]
    unseen = [domain.name for domain in domains if domain.expert is None]
    return UnseenDetection(
        at=list(AT),
        auroc={
            name: {other: [auroc(_after(seen, name, at), _after(found[other], name, at)) for at in AT] for other in unseen}
            for name in names
        },
        to_base={
            name: float((torch.cat([text[DECIDES] for text in texts]) < 0).double().mean()) for name, texts in found.items()
        }
        if decides
        else None,
    )


def auroc(seen: Sequence[float], unseen: Sequence[float]) -> float | None:
    """How often a seen text has a larger score than an unseen one, a draw half; None without one of them."""
    if not seen or not unseen:
        return None
    a, b = torch.tensor(seen)[:, None], torch.tensor(unseen)[None]
    return float(((a > b).double() + (a == b).double() / 2).mean())


def _after(texts: Sequence[dict[str, torch.Tensor]], name: str, tokens: int) -> list[float]:
    """A score of each text that has so many tokens."""
    return [float(text[name][tokens - 1]) for text in texts if len(text[name]) >= tokens]
