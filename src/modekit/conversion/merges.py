"""Merges of a mixture's models into one dense model: which is best on the select split; losses are means over domains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from pydantic import BaseModel
from transformers import PreTrainedModel

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.evaluation.domains import Domain
from modekit.experts.specialist import held_out_scores
from modekit.loaded.experts import load_expert_source
from modekit.planning.make import backbone_of
from modekit.planning.plan import Plan
from modekit.planning.tensors import PlannedTensor
from modekit.recipes.backbone import Backbone, BackboneExpert, BackboneMerge
from modekit.run import Run
from modekit.sources.contents import OpenFiles
from modekit.sources.names import natural_key
from modekit.weights.reading import WeightReader

By = Literal["distil", "average", "sum", "best"]
SCALES = (1.0, 1.5, 2.0, 3.0)
"""Of a sum, in parts of the average's, which is 1 / experts."""
UNMEASURED = 2.0
"""The one where nothing can be measured (benchmarks/densify.md)."""


class Merge(BaseModel, frozen=True):
    """A rule and its setting: the scale of a sum, or the one expert."""

    by: By
    scale: float | None = None
    expert: str | None = None

    @property
    def said(self) -> str:
        """In words."""
        scale = None if self.scale is None else f"scale {self.scale:g}"
        return " ".join(filter(None, [self.by, scale, self.expert]))

    @property
    def backbone(self) -> Backbone:
        """The same as a recipe's rule for a backbone."""
        if self.expert is not None:
            return BackboneExpert(expert=self.expert)
        if self.scale is not None:
            return BackboneMerge(method="task_arithmetic", scale=self.scale)
        return "average"


@dataclass(frozen=True)
class Merger:
    """Merges of a mixture's models, in memory one after another; `domains` is text of the select split."""

    checkpoint: Checkpoint
    plan: Plan
    domains: Sequence[Domain]
    run: Run

    @cached_property
    def model(self) -> PreTrainedModel:
        """The base's, whose weights are set to a merge's."""
        return load_expert_source(self.checkpoint, None, run=self.run)

    @torch.no_grad()
    def set(self, merge: Merge) -> PreTrainedModel:
        """The model with the weights of a merge: each as the rule makes it of all models' or takes it of one's."""
        mixture = self.plan.recipe.mixture.model_copy(update={"backbone": merge.backbone})
        made = backbone_of(self.plan.recipe.model_copy(update={"mixture": mixture}), self.plan.sources)
        base, named = self.plan.sources[0], dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        names = sorted(self.plan.family.own_names(base), key=natural_key)
        with OpenFiles() as opened:
            read = WeightReader(opened, self.plan.models)
            for ref in self.run.over("merge", [base.tensors[name] for name in names], len(names)):
                data = bytearray()
                for block in PlannedTensor(ref.name, "F32", ref.shape, "backbone", made(ref)).blocks(read):
                    data += block  # each lies where the one before it lay
                named[ref.name].copy_(torch.frombuffer(data, dtype=torch.float32).view(ref.shape))
        return self.model

    def best(self, by: By, scale: float | None) -> Merge:
        """The best of a rule's merges; of all rules' where the rule is distil. The middle one where there is no text."""
        found = list(self._possible(by, scale))
        if len(found) == 1:
            return found[0]
        if not self.domains:
            return next(merge for merge in found if merge.scale in (None, self._scale(UNMEASURED)))
        return min(found, key=self._loss)

    def _loss(self, merge: Merge) -> float:
        scores = held_out_scores(self.set(merge), self.domains, merge.said, self.run)
        return sum(score.loss for score in scores.values())

    def _scale(self, times: float) -> float:
        moved = sum(not expert.is_base for expert in self.plan.recipe.experts)
        return times / max(1, moved)

    def _possible(self, by: By, scale: float | None) -> Iterator[Merge]:
        if by == "average":
            yield Merge(by="average")
        if by in ("sum", "distil"):
            for each in map(self._scale, SCALES) if scale is None else [scale]:
                yield Merge(by="sum", scale=each)
        if by in ("best", "distil"):
            yield from (Merge(by="best", expert=name) for name in self.plan.recipe.names)
