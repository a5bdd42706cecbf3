"""Which merge is best on the select split: scales of a sum and of svd, each expert alone; losses are means over domains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PreTrainedModel

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.conversion.dense_record import By, Merge
from modekit.evaluation.domains import Domain
from modekit.experts.specialist import held_out_losses
from modekit.loaded.experts import load_expert_source
from modekit.planning.dense import DensePlan, dense_plan
from modekit.planning.plan import Plan
from modekit.recipes.mixture import Backbone, BackboneExpert, BackboneMerge
from modekit.run import Run
from modekit.sources.contents import OpenFiles
from modekit.weights.reading import Reading

SCALES = (1.0, 1.5, 2.0, 3.0)
"""Of a sum, in parts of the average's, which is 1 / experts."""
UNMEASURED = 2.0
"""The one where nothing can be measured (benchmarks/densify.md)."""

_State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Chooser:
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
    def _named(self) -> _State:
        return dict(self.model.named_parameters()) | dict(self.model.named_buffers())

    @cached_property
    def _base(self) -> _State:
        return {tensor.name: self._named[tensor.name].detach().clone() for tensor in self.planned(Merge(by="average")).tensors}

    def planned(self, merge: Merge, dtype: str | None = None) -> DensePlan:
        """The merge as a plan, in the base's dtypes or in one."""
        backbone: Backbone = "average"
        if merge.expert is not None:
            backbone = BackboneExpert(expert=merge.expert)
        elif merge.scale is not None:
            backbone = BackboneMerge(method="svd" if merge.by == "svd" else "task_arithmetic", scale=merge.scale)
        return dense_plan(self.plan, backbone, dtype)

    def set(self, merge: Merge) -> PreTrainedModel:
        """The model with the weights of a merge."""
        return self._set_between(self._state(merge), 1.0)

    def _state(self, merge: Merge) -> _State:
        dense, found = self.planned(merge, "F32"), _State()
        with OpenFiles() as opened:
            read = Reading(opened, dense.plan.models)
            for tensor in self.run.over("merge", dense.tensors, len(dense.tensors)):
                data = bytearray()
                for block in tensor.blocks(read):  # each lies where the one before it lay
                    data += block
                found[tensor.name] = torch.frombuffer(data, dtype=torch.float32).view(tensor.shape)
        return found

    @torch.no_grad()
    def _set_between(self, merged: _State, scale: float) -> PreTrainedModel:
        """Base + scale * (merged - base)."""
        for name, origin in self._base.items():
            self._named[name].copy_(origin + scale * (merged[name].to(origin.device) - origin))
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
