"""Which groups does a mixture serve already? Its router, which reads the text alone, routes their documents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.recipes.strict import BASE
from modekit.routing.text_router import TextRouter
from modekit.run import Run
from modekit.search.discover.result import Coverage

SURE = 0.9
"""Probability from which a router is certain of an expert."""
ROUTED = 200
"""Largest number of documents of a group that are routed."""


class CoverageMeter:
    """A mixture's router, for documents that have no label."""

    def __init__(self, mixture: Checkpoint, run: Run) -> None:
        """Raises UnsupportedError when the router needs the model."""
        self._router = TextRouter(mixture, run=run)
        self._not_experts = {BASE, *(expert.name for expert in mixture.record.recipe.experts if expert.is_base)}

    def measure(self, documents: Sequence[str], advance: Callable[[], None]) -> Coverage:
        """Of a group, by its first documents; `advance` is called after each."""
        led: Counter[str] = Counter()
        sure: Counter[str] = Counter()
        certainty = 0.0
        routed = documents[:ROUTED]
        for document in routed:
            decision = self._router.decide(document)
            leads = max(decision.probabilities.values())
            led[decision.expert] += 1
            certainty += leads
            if decision.expert not in self._not_experts and leads >= SURE:
                sure[decision.expert] += 1
            advance()
        count = max(1, len(routed))
        return Coverage(
            documents=len(routed),
            experts={name: round(led[name] / count, 6) for name in _most_first(led)},
            certainty=round(certainty / count, 6),
            served=round(sum(sure.values()) / count, 6),
            expert=next(iter(_most_first(sure)), None),
        )


def _most_first(counts: Counter[str]) -> list[str]:
    return sorted(counts, key=lambda name: (-counts[name], name))
