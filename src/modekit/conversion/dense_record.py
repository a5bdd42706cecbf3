"""densify.json: what one dense model was made of, and what it kept of the mixture."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

DENSE_FILE = "densify.json"
By = Literal["distil", "average", "sum", "best", "svd"]


class Merge(BaseModel, frozen=True):
    """A rule and its setting: the scale of a sum or of svd, or the one expert."""

    by: By
    scale: float | None = None
    expert: str | None = None

    @property
    def said(self) -> str:
        """In words."""
        scale = None if self.scale is None else f"scale {self.scale:g}"
        return " ".join(filter(None, [self.by, scale, self.expert]))


class Distilled(BaseModel, frozen=True):
    """How it went: `steps` taken, the state of `best_step` was written; `weight` of the text's own loss."""

    settings: dict[str, object]
    weight: float
    steps: int
    best_step: int
    select_loss: dict[str, tuple[float, float]]


class DenseRecord(BaseModel, frozen=True):
    """The content of densify.json.

    Attributes:
        mixture: name of its folder.
        merge: what was written, or what a distillation began from.
        parameters: of the dense model.
        losses: row (base, experts, mixture, merge, dense) -> domain -> nats per token of the report split; empty without text.
            `experts` has each domain's own.
    """

    by: By
    mixture: str
    merge: Merge
    parameters: int
    distilled: Distilled | None = None
    losses: dict[str, dict[str, float]] = {}
    notes: list[str] = []

    def gap_closed(self, row: str) -> float | None:
        """(base - row) / (base - own expert), mean over the domains whose own expert is better than the base."""
        if row not in self.losses:
            return None
        base, own, ours = (self.losses[name] for name in ("base", "experts", row))
        shares = [(base[name] - ours[name]) / (base[name] - own[name]) for name in ours if own[name] < base[name]]
        return sum(shares) / len(shares) if shares else None

    @property
    def kept(self) -> float | None:
        """The share of the mixture's gap that the dense model keeps."""
        ours, mixture = self.gap_closed("dense"), self.gap_closed("mixture")
        return ours / mixture if ours is not None and mixture else None
