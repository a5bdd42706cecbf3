"""One dense model of the base's size from the models of a mixture: every tensor what a backbone rule makes of theirs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from modekit.planning.make import backbone_of
from modekit.planning.plan import Plan
from modekit.planning.tensors import PlannedTensor, cut_into_shards
from modekit.recipes.mixture import Backbone
from modekit.sources.config import Config
from modekit.sources.names import natural_key


@dataclass(frozen=True)
class DensePlan:
    """The tensors of one dense model. Of `plan`, which has them as its shards, shape and gates are still the mixture's."""

    plan: Plan
    config: Config

    @property
    def tensors(self) -> tuple[PlannedTensor, ...]:
        """All of them."""
        return tuple(tensor for shard in self.plan.shards for tensor in shard.tensors)


def dense_plan(plan: Plan, backbone: Backbone, dtype: str | None = None) -> DensePlan:
    """By a rule that merges all tensors of a plan's models, or takes those of one expert, in a safetensors dtype or the base's.

    Raises MismatchError.
    """
    mixture = plan.recipe.mixture.model_copy(update={"backbone": backbone})
    recipe = plan.recipe.model_copy(update={"mixture": mixture})
    base, made = plan.sources[0], backbone_of(recipe, plan.sources)
    refs = [base.tensors[name] for name in sorted(plan.family.own_names(base), key=natural_key)]
    tensors = [PlannedTensor(ref.name, dtype or ref.source_dtype, ref.shape, "backbone", made(ref)) for ref in refs]
    config = dict(base.on_disk or base.config)
    if plan.vocabulary is not None and plan.vocabulary.is_grown:
        config |= {"vocab_size": base.config["vocab_size"], **plan.vocabulary.tokenizer.settings}
    shards = cut_into_shards(tensors, recipe.output.shard_size)
    return DensePlan(replace(plan, recipe=recipe, shards=shards, reused=None), config)
