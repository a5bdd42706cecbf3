"""Where the models of a recipe are: a folder beside it, or the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from modekit.recipes.recipe import Expert, Recipe, label_of
from modekit.run import Run
from modekit.sources.adapter import open_adapter
from modekit.sources.class_names import named_by_class
from modekit.sources.folders import model_folder
from modekit.sources.source import ModelSource, open_source


def open_recipe_sources(recipe: Recipe, root: Path, *, run: Run) -> tuple[ModelSource, ...]:
    """The base model, then each expert's model in recipe order; 'base' experts share the base's source.

    Models on the hub are downloaded. Raises SourceError.
    """
    opener = Opener(root, run)
    base = opener.base(recipe)
    return (base, *(opener.expert(place, expert, base) for place, expert in enumerate(recipe.experts)))


@dataclass(frozen=True)
class Opener:
    """Opens the models that a recipe names, one by one; see `open_recipe_sources`. Everything here raises SourceError."""

    root: Path
    run: Run

    def base(self, recipe: Recipe) -> ModelSource:
        """The base model."""
        return self._model("base_model", recipe.base_model, recipe.revision)

    def expert(self, place: int, expert: Expert, base: ModelSource) -> ModelSource:
        """An expert's model, or what its adapter does to the base."""
        label = label_of(place, expert)
        if expert.is_base:
            return base
        if expert.adapter is None:
            return self._model(label, expert.source, expert.revision)
        folder, commit = model_folder(
            expert.adapter, expert.revision, root=self.root, label=label, run=self.run, as_adapter=True
        )
        return open_adapter(label, expert.adapter, folder, base, revision=commit)

    def _model(self, label: str, spec: str, revision: str | None) -> ModelSource:
        folder, commit = model_folder(spec, revision, root=self.root, label=label, run=self.run)
        return named_by_class(open_source(label, spec, folder, revision=commit, run=self.run))
