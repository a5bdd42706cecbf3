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
from modekit.experts.specialist import held_out_losses
from modekit.loaded.experts import load_expert_source
from modekit.planning.make import backbone_of
from modekit.planning.plan import Plan
from modekit.planning.tensors import PlannedTensor
from modekit.recipes.mixture import Backbone, BackboneExpert, BackboneMerge
from modekit.run import Run
from modekit.sources.contents import OpenFiles
from modekit.sources.names import natural_key
from modekit.weights.reading import WeightReader

By = Literal["distil", "average", "sum", "best", "svd"]
SCALES = (1.0, 1.5, 2.0, 3.0)
"""Of a sum, in parts of the average's, which is 1 / experts."""
UNMEASURED = 2.0
"""The one where nothing can be measured (benchmarks/densify.md)."""

_State = dict[str, torch.Tensor]


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

    @property
    def backbone(self) -> Backbone:
        """The same as a recipe's rule for a backbone."""
        if self.expert is not None:
            return BackboneExpert(expert=self.expert)
        if self.scale is not None:
            return BackboneMerge(method="svd" if self.by == "svd" else "task_arithmetic", scale=self.scale)
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

    @cached_property
    def _base(self) -> _State:
        """Of what a merge makes, the base's."""
        return {tensor.name: self._named[tensor.name].detach().clone() for tensor in self._tensors(Merge(by="average"))}

    @cached_property
    def _named(self) -> _State:
        return dict(self.model.named_parameters()) | dict(self.model.named_buffers())

    def _tensors(self, merge: Merge) -> list[PlannedTensor]:
        """Of a dense model of the base's size, each as the rule makes it of all models' or takes it of one's."""
        mixture = self.plan.recipe.mixture.model_copy(update={"backbone": merge.backbone})
        base, made = (
            self.plan.sources[0],
            backbone_of(self.plan.recipe.model_copy(update={"mixture": mixture}), self.plan.sources),
        )
        refs = [base.tensors[name] for name in sorted(self.plan.family.own_names(base), key=natural_key)]
        return [PlannedTensor(ref.name, "F32", ref.shape, "backbone", made(ref)) for ref in refs]

    def set(self, merge: Merge) -> PreTrainedModel:
        """The model with the weights of a merge."""
        return self._set_between(self._state(merge), 1.0)

    def _state(self, merge: Merge) -> _State:
        tensors, found = self._tensors(merge), _State()
        with OpenFiles() as opened:
            read = WeightReader(opened, self.plan.models)
            for tensor in self.run.over("merge", tensors, len(tensors)):
                data = bytearray()
                for block in tensor.blocks(read):  # each lies where the one before it lay
                    data += block
                found[tensor.name] = torch.frombuffer(data, dtype=torch.float32).view(tensor.shape)
        return found

    @torch.no_grad()
    def _set_between(self, merged: _State, scale: float) -> PreTrainedModel:
        """Base + scale * (merged - base)."""
        for name, origin in self._base.items():
            moved = merged[name].to(origin.device)
            self._named[name].copy_(moved if scale == 1 else origin + scale * (moved - origin))
        return self.model

    def best(self, by: By, scale: float | None) -> Merge:
        """The best of a rule's merges; of all rules' where the rule is distil. The middle one where there is no text."""
        found = list(self._possible(by, scale))
        if len(found) == 1:
            return found[0]
        if not self.domains:
            return next(merge for merge in found if merge.scale in (None, self._scale(UNMEASURED)))
        losses: dict[Merge, float] = {}
        direction: _State = {}
        for merge in found:
            if merge.scale is None:
                self.set(merge)
            else:  # every scale of a rule is a point on one line
                direction = direction or self._state(merge.model_copy(update={"scale": 1.0}))
                self._set_between(direction, merge.scale)
            losses[merge] = sum(held_out_losses(self.model, self.domains, merge.said, self.run).values())
        return min(losses, key=lambda merge: losses[merge])

    def _scale(self, times: float) -> float:
        moved = sum(not expert.is_base for expert in self.plan.recipe.experts)
        return times / max(1, moved)

    def _possible(self, by: By, scale: float | None) -> Iterator[Merge]:
        if by == "average":
            yield Merge(by="average")
        if by in ("sum", "svd", "distil"):
            for each in map(self._scale, SCALES) if scale is None else [scale]:
                yield Merge(by="svd" if by == "svd" else "sum", scale=each)
        if by in ("best", "distil"):
            yield from (Merge(by="best", expert=name) for name in self.plan.recipe.names)
