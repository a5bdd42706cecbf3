"""Which merge is best on the select split: scales of a sum and of svd, each expert alone; losses are means over domains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedModel

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.conversion.dense_record import By, Merge
from modekit.conversion.merged import State, merged_state, set_between, state_of
from modekit.evaluation.domains import Domain
from modekit.evaluation.loss import score_domain
from modekit.loaded.experts import load_expert_source
from modekit.planning.dense import DensePlan, dense_plan
from modekit.planning.plan import Plan
from modekit.recipes.mixture import Backbone, BackboneExpert, BackboneMerge
from modekit.run import Run

SCALES = (1.0, 1.5, 2.0, 3.0)
"""Of a sum, in parts of the average's, which is 1 / experts."""
UNMEASURED = 2.0
"""The one where nothing can be measured (benchmarks/densify.md)."""


def backbone_of(merge: Merge) -> Backbone:
    """The rule as a plan takes it."""
    if merge.expert is not None:
        return BackboneExpert(expert=merge.expert)
    if merge.by == "svd":
        return BackboneMerge.model_validate({"method": "svd", "scale": merge.scale})
    return "average" if merge.by == "average" else BackboneMerge(method="task_arithmetic", scale=merge.scale or 1.0)


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
    def _base(self) -> State:
        return state_of(self.model, self.state(Merge(by="average")))

    def state(self, merge: Merge) -> State:
        """Its tensors, float32."""
        return merged_state(self.planned(merge, in_memory=True), self.run)

    def planned(self, merge: Merge, *, in_memory: bool = False) -> DensePlan:
        """The merge as a plan, in the base's dtypes or in float32."""
        return dense_plan(self.plan, backbone_of(merge), "F32" if in_memory else None)

    def set(self, merge: Merge) -> PreTrainedModel:
        """The model with the weights of a merge."""
        base = self._base
        set_between(self.model, base, self.state(merge), 1.0)
        return self.model

    def best(self, by: By, scale: float | None) -> Merge:
        """The best of a rule's merges; of all rules' where the rule is distil. The middle one where there is no text."""
        found = list(self._possible(by, scale))
        if len(found) == 1:
            return found[0]
        if not self.domains:
            return next(merge for merge in found if merge.scale in (None, self._scale(UNMEASURED)))
        losses: dict[Merge, float] = {}
        direction: tuple[By, State] | None = None
        for merge in self.run.over("compare merges", found, len(found)):
            if merge.scale is None:
                self.set(merge)
            else:  # every scale is a point on one line
                if direction is None or direction[0] != merge.by:
                    direction = merge.by, self.state(merge.model_copy(update={"scale": 1.0}))
                set_between(self.model, self._base, direction[1], merge.scale)
            losses[merge] = mean_loss(self.model, self.domains)
        return min(losses, key=lambda merge: losses[merge])

    def _scale(self, times: float) -> float:
        moved = sum(not expert.is_base for expert in self.plan.recipe.experts)
        return times / max(1, moved)

    def _possible(self, by: By, scale: float | None) -> Iterator[Merge]:
        scales = [scale] if scale is not None else list(map(self._scale, SCALES))
        if by == "average":
            yield Merge(by="average")
        if by in ("sum", "distil"):
            yield from (Merge(by="sum", scale=each) for each in scales)
        if by == "svd":
            yield from (Merge(by="svd", scale=each) for each in scales)
        if by in ("best", "distil"):
            yield from (Merge(by="best", expert=name) for name in self.plan.recipe.names)


def mean_loss(model: PreTrainedModel, domains: Sequence[Domain]) -> float:
    """Nats per token, each domain counting the same."""
    return sum(losses_by_domain(model, domains).values()) / len(domains)


def losses_by_domain(
    model: PreTrainedModel, domains: Sequence[Domain], progress: Callable[[int], object] = lambda tokens: None
) -> dict[str, float]:
    """Nats per token."""
    return {domain.name: score_domain(model, domain, progress).loss for domain in domains}
