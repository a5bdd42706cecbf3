"""Which groups does a mixture serve already? What its router, which reads the text alone, makes of their documents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.errors import MismatchError
from modekit.recipes.strict import BASE
from modekit.routing.text_router import TextRouter
from modekit.sources.tokenizer import check_same_tokenizer

SURE = 0.9
"""Probability from which a router is sure of an expert."""
ASKED = 200
"""Documents of a group that are asked about at most."""


@dataclass(frozen=True)
class Served:
    """What a router makes of a group.

    Attributes:
        documents: how many were asked about.
        experts: expert -> share of the documents that it leads on, the largest first.
        certainty: mean probability of whoever leads.
        served: share of the documents on which an expert, and not the base, leads with a probability of SURE or more.
        expert: who does that most often; None where nobody does.
    """

    documents: int
    experts: Mapping[str, float]
    certainty: float
    served: float
    expert: str | None

    def as_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "experts": {name: round(share, 6) for name, share in self.experts.items()}}


class Serving:
    """A mixture, asked about documents."""

    def __init__(self, checkpoint: Checkpoint, router: TextRouter) -> None:
        experts = checkpoint.record.recipe.experts
        self._router = router
        self._nobody = {BASE, *(expert.name for expert in experts if expert.is_base)}

    def of(self, documents: Sequence[str], advance: Callable[[], None]) -> Served:
        """What becomes of a group's first documents; `advance` is called after each."""
        led: Counter[str] = Counter()
        sure: Counter[str] = Counter()
        certainty = 0.0
        asked = documents[:ASKED]
        for document in asked:
            decision = self._router.decide(document)
            leads = max(decision.probabilities.values())
            led[decision.expert] += 1
            certainty += leads
            if decision.expert not in self._nobody and leads >= SURE:
                sure[decision.expert] += 1
            advance()
        count = max(1, len(asked))
        experts = {name: led[name] / count for name in _most_first(led)}
        expert = next(iter(_most_first(sure)), None)
        return Served(len(asked), experts, round(certainty / count, 6), round(sum(sure.values()) / count, 6), expert)


def _most_first(counts: Counter[str]) -> list[str]:
    return sorted(counts, key=lambda name: (-counts[name], name))


def check_tokenizer(model: Path, mixture: Path) -> None:
    """Raise MismatchError when a mixture reads text by another tokenizer than the base model that groups were made with."""
    try:
        check_same_tokenizer(model, mixture, where="--mixture")
    except MismatchError as error:
        raise MismatchError(
            "the mixture has another tokenizer than the base model",
            where="--model, --mixture",
            found=error.found or error.what,
            expected="the base model of this mixture",
            remedy="give that model, or leave out --features and --model",
        ) from None
