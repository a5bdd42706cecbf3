"""What `modekit verify --deep` found, as it is kept and shown; no torch is needed to read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from modekit.checkpoint.sources import OwnModel
from modekit.evaluation.results_folder import Result
from modekit.evaluation.tables import ResultTable
from modekit.files.figures import or_dash
from modekit.files.typed import Count, Label, Number

SAME = 1e-9  # nats per token: models that are no further apart are one, and a share of that means nothing


@dataclass(frozen=True)
class ForcedExpert:
    """A mixture whose gates are forced on an expert, beside the expert's own model, on one text.

    Attributes:
        own_model: how it was made: the base, the full model, PEFT's of base and adapter, or the adapter folded in without PEFT.
        largest: largest absolute difference of log-probabilities, own and forced, over tokens and vocabulary.
        kl, base_kl: KL(own || forced) and KL(own || base), and losses: means in nats per token.
    """

    expert: Label
    text: Label
    own_model: OwnModel
    tokens: Count
    largest: Number
    kl: Number
    base_kl: Number
    own_loss: Number
    forced_loss: Number
    base_loss: Number

    @property
    def lost(self) -> float | None:
        """KL(own || forced) / KL(own || base): 0 = the whole expert, 1 = nothing; None where own model and base are one."""
        return self.kl / self.base_kl if self.base_kl > SAME else None


@dataclass(frozen=True)
class ForcedExperts(Result):
    """forced.json: every expert on its own text, one without such on the text of every domain."""

    rows: Annotated[Sequence[ForcedExpert], Field(min_length=1, max_length=2**16)]

    file = "forced.json"
    command = "modekit verify --deep"

    def tables(self) -> list[ResultTable]:
        """Every row."""
        titles = ["expert", "text", "KL", "lost", "largest difference", "own loss", "forced loss", "base loss"]
        body = []
        for row in self.rows:
            figures = map(or_dash, (row.kl, row.lost, row.largest))
            losses = [f"{loss:.4f}" for loss in (row.own_loss, row.forced_loss, row.base_loss)]
            body.append([row.expert, row.text, *figures, *losses])
        said = (
            "Every expert, gates forced on it, beside its own model on held-out text: KL in nats per token; lost: KL "
            "over the base's KL (0 = the whole expert, 1 = nothing of it); largest difference of log-probabilities; losses."
        )
        return [ResultTable("Experts forced", titles, body, said)]
