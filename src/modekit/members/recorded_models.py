"""Experts' models by what a mixture records of them: enough to plan with, though the models may be gone.

A mixture that is changed takes the tensors of the experts that stay from itself (planning/reuse.py); of their models it needs
names and shapes. A full model has those of its base; what an adapter changes, the mixture's own tensors say.
"""

from __future__ import annotations

from pathlib import Path

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.planning.shape import LowRankPart, MixedTensor
from modekit.recipes.recipe import Expert
from modekit.sources.adapter import AdapterSource, Change, LowRank
from modekit.sources.model import ModelSource, TensorRef
from modekit.sources.names import module_of


def recorded_model(label: str, expert: Expert, base: ModelSource, checkpoint: Checkpoint, number: int) -> ModelSource:
    """What is known of expert `number` of a checkpoint; reading a tensor of it raises SourceError."""
    record = checkpoint.record
    recorded = record.sources[record.expert_sources[number]]
    folder = checkpoint.source_folder(recorded)
    file = folder / next(iter(recorded.files), "model.safetensors")
    if expert.adapter is None:
        tensors = {name: _ref(name, file, ref.dtype, ref.shape) for name, ref in base.tensors.items()}
        return ModelSource(label, recorded.spec, folder, recorded.revision, base.config, tensors)
    mixed = list(checkpoint.shape.mixed_tensors(checkpoint.tensors))
    replaced = {
        each.name: _ref(each.name, file, base.tensor(each.name).dtype, each.shape)
        for each in mixed
        if number in each.own and not each.holds_changes
    }
    added = {module_of(each.name): each for each in mixed if number in each.own and each.holds_changes}
    changes: dict[str, Change] = {
        each.name: _low_rank(each.name, each.low_rank[number], added.get(module_of(each.name)), file)
        for each in mixed
        if number in each.low_rank
    }
    nothing = {"": _ref("", file, "U8", (0,))}  # so that its file is known
    return AdapterSource(label, recorded.spec, folder, recorded.revision, {}, nothing, changes, {}, replaced)


def records_dtypes(checkpoint: Checkpoint) -> bool:
    """Whether the mixture tells in which dtype its adapters were: where they had several, all of them lie in float32."""
    mixed = checkpoint.shape.mixed_tensors(checkpoint.tensors)
    wide = any(part.a.dtype == "F32" for each in mixed for part in each.low_rank.values())
    return not wide or checkpoint.config["dtype"] == "float32"


def _low_rank(name: str, part: LowRankPart, added: MixedTensor | None, file: Path) -> LowRank:
    rank = part.ranks.stop - part.ranks.start
    bias = None if added is None else _ref(f"{name} bias", file, next(iter(added.own.values())).ref.dtype, added.shape)
    return LowRank(
        _ref(f"{name} A", file, part.a.dtype, (rank, part.a.shape[1])),
        _ref(f"{name} B", file, part.b.dtype, (part.b.shape[0], rank)),
        part.scale,
        bias=bias,
    )


def _ref(name: str, file: Path, dtype: str, shape: tuple[int, ...]) -> TensorRef:
    return TensorRef(name, file, dtype, shape, 0, 0)
