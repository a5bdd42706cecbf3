"""What the files of a recipe's models say: which experts can be mixed, and how far each moved from the base. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from modekit.errors import SourceError
from modekit.recipes.recipe import Recipe
from modekit.run import Run
from modekit.search.advise.checks import Models, open_models
from modekit.search.advise.drift import Drift, compare
from modekit.search.advise.groups import Group, groups_of
from modekit.sources.adapter import AdapterSource
from modekit.sources.model import ModelSource


@dataclass(frozen=True)
class Examined:
    """A recipe, its models, the group of every tensor, how far experts moved, and the indices of those that can be mixed."""

    recipe: Recipe
    root: Path
    models: Models
    groups: Mapping[str, Group]
    drift: Drift
    usable: Sequence[int]

    @property
    def sources(self) -> list[ModelSource]:
        """One per expert; the base's for those that cannot be opened."""
        return self.models.by_index(len(self.recipe.experts))

    @property
    def moved(self) -> list[int]:
        """Of the usable: those that differ from the base."""
        return [index for index in self.usable if self.drift.moved[index]]

    def is_low_rank(self, index: int) -> bool:
        """Whether an expert is an adapter, or is to be kept as one."""
        adapter = isinstance(self.models.experts[index], AdapterSource)
        return adapter or self.recipe.experts[index].lora_rank is not None


def examine(
    recipe: Recipe,
    root: Path,
    *,
    run: Run,
) -> Examined:
    """Open every model and read every tensor once. Raises what is wrong with the base model."""
    models = open_models(recipe, root, run=run)
    groups = groups_of(models.base, models.family)
    drift = compare(models.base, models.by_index(len(recipe.experts)), groups, run=run)
    if drift.base_damaged:
        raise SourceError(
            "the weights hold NaN or Inf",
            where=f"base_model ({models.base.spec}): {drift.base_damaged[0]}",
            remedy="the model is damaged: save or download it again",
        )
    return Examined(recipe, root, models, groups, drift, [index for index in models.experts if not drift.damaged[index]])
