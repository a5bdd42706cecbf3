"""What experts lose: whatever they changed outside of the mixed parts, where the backbone does not take it up.

A plan reads headers only, so that of full models it says that something may be lost, not how much; `modekit advise` measures
that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from modekit.errors import UnsupportedError
from modekit.files.read import UNREADABLE, read_json
from modekit.recipes.backbone import BackboneExpert
from modekit.recipes.recipe import Recipe
from modekit.recipes.strict import BASE
from modekit.sources.adapter import AdapterSource
from modekit.sources.model import SPECIALIST_FILE, ModelSource
from modekit.sources.names import is_ignored


def lost_changes(recipe: Recipe, sources: Sequence[ModelSource], way_out: str, mixed: set[str]) -> Iterator[str]:
    """A note that names the full models of a recipe that may lose something; none on another backbone, or when all is mixed.

    `sources` are the base model and then each expert's, `mixed` the base's tensors of which experts have their own, `way_out`
    how a recipe mixes more of them.
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
            f"(`modekit advise` measures how much); {way_out}, or merge the backbone (mixture.backbone: average)"
        )


def lost_of_adapters(recipe: Recipe, sources: Sequence[ModelSource], way_out: str, mixed: set[str]) -> Iterator[str]:
    """A note for each adapter of which something is lost, of the same arguments. Raises UnsupportedError when that is all."""
    merged, backbone = recipe.mixture.merge is not None, recipe.mixture.backbone
    kept = backbone.expert if isinstance(backbone, BackboneExpert) else None
    for expert, source in zip(recipe.experts, sources[1:], strict=True):
        if not isinstance(source, AdapterSource):
            continue
        changed = {*source.changes, *source.bias_changes, *source.replaced}
        if not changed & mixed:
            raise UnsupportedError(
                "the adapter changes nothing that this recipe mixes",
                where=f"{source.label} ({source.spec})",
                found=f"it changes {_kinds(changed)}",
                remedy=f"{way_out}, or remove the expert",
            )
        outside = changed - mixed
        if outside and not merged and kept != expert.name:
            yield (
                f"{expert.name}: its adapter also changes {_kinds(outside)} ({len(outside)} tensors), which is not mixed here: "
                f"on this backbone that is lost; {way_out}, or merge the backbone (mixture.backbone: average)"
            )


def _kinds(names: set[str]) -> str:
    """The distinct last parts of tensor names, for a message."""
    return ", ".join(sorted({name.removesuffix(".weight").rpartition(".")[2] for name in names}))


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
