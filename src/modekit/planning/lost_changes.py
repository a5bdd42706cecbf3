"""What full models lose on the base model's backbone: whatever they changed outside of the mixed parts.

A plan reads headers only, so that it says that this is lost, not how much it is; `modekit advise` measures that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from modekit.files.read import UNREADABLE, read_json
from modekit.recipes.recipe import Recipe
from modekit.recipes.strict import BASE
from modekit.sources.adapter import AdapterSource
from modekit.sources.model import SPECIALIST_FILE, ModelSource
from modekit.sources.names import is_ignored


def lost_changes(recipe: Recipe, sources: Sequence[ModelSource], mixed: set[str]) -> Iterator[str]:
    """A note that names the full models of a recipe that may lose something; none on another backbone, or when all is mixed.

    `sources` are the base model and then each expert's, `mixed` the base's tensors of which experts have their own.
    """
    outside = [name for name in sources[0].tensors if name not in mixed and not is_ignored(name)]
    if recipe.mixture.backbone != BASE or not outside:
        return
    names = [
        expert.name
        for expert, source in zip(recipe.experts, sources[1:], strict=True)
        if not (expert.is_base or expert.lora_rank is not None or isinstance(source, AdapterSource))
        and not (_mixes_every_ffn(recipe) and _changed_ffn_alone(source))
    ]
    if names:
        yield (
            f"{', '.join(names)}: whatever a full model changed outside of what is mixed is lost on the base model's backbone "
            "(`modekit advise` measures how much); mix more (mixture.modules, mixture.layers), or merge the backbone (average)"
        )


def _mixes_every_ffn(recipe: Recipe) -> bool:
    modules = recipe.mixture.modules
    return recipe.mixture.layers is None and (not isinstance(modules, list) or "mlp" in modules)


def _changed_ffn_alone(source: ModelSource) -> bool:
    """Whether `modekit specialize` says that it trained nothing but the FFNs."""
    try:
        record = read_json(source.folder / SPECIALIST_FILE)
    except UNREADABLE:
        return False
    return isinstance(record, dict) and record.get("specialist") == "mlp"
