"""Experts whose models are gone, by what a mixture says of them: enough to plan with, and nothing of them can be read.

A mixture that is changed takes the tensors of the experts that stay from itself (planning/kept.py); of their models it needs
names and shapes. A full model has those of its base. Of an adapter the mixture's config has the ranks and scales.
"""

from __future__ import annotations

from pathlib import Path

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.planning.mixture_config import Place
from modekit.recipes.recipe import Expert
from modekit.sources.adapter import AdapterSource, Change, LowRank
from modekit.sources.model import ModelSource, TensorRef
from modekit.sources.names import weight_of


def stand_in(label: str, expert: Expert, base: ModelSource, checkpoint: Checkpoint, number: int) -> ModelSource:
    """What is known of expert `number` of a checkpoint; reading a tensor of it raises SourceError."""
    record = checkpoint.record
    recorded = record.sources[record.expert_sources[number]]
    folder = checkpoint.source_folder(recorded)
    file = folder / next(iter(recorded.files), "model.safetensors")
    if expert.adapter is None:
        tensors = {name: _like(ref, name, file) for name, ref in base.tensors.items()}
        return ModelSource(label, recorded.spec, folder, recorded.revision, base.config, tensors)
    changes: dict[str, Change] = {}
    replaced: dict[str, TensorRef] = {}
    for module, place in checkpoint.shape.mixture.places.items():
        own = {name: ref for name, ref in base.tensors.items() if name.startswith(f"{module}.")}
        if number in place.own:
            replaced |= {name: _like(ref, name, file) for name, ref in own.items()}
        elif place.ranks[number]:
            changes[weight_of(module)] = _low_rank(checkpoint, module, place, number, file)
    return AdapterSource(
        label, recorded.spec, folder, recorded.revision, {}, {"": _nothing(file)}, changes, {}, replaced
    )  # fmt: skip


def _like(ref: TensorRef, name: str, file: Path) -> TensorRef:
    return TensorRef(name, file, ref.dtype, ref.shape, 0, ref.nbytes)


def _nothing(file: Path) -> TensorRef:
    return TensorRef("", file, "U8", (0,), 0, 0)


def _low_rank(checkpoint: Checkpoint, module: str, place: Place, number: int, file: Path) -> LowRank:
    a, b = (checkpoint.tensors[f"{module}.lora_{side}"] for side in "AB")
    rank = place.ranks[number]
    bias = checkpoint.tensors[f"{module}.lora_bias"] if number in place.biased else None
    return LowRank(
        TensorRef(f"{module}.lora_A", file, a.dtype, (rank, a.shape[1]), 0, 0),
        TensorRef(f"{module}.lora_B", file, b.dtype, (b.shape[0], rank), 0, 0),
        place.scales[number],
        bias=bias and TensorRef(f"{module}.lora_bias", file, bias.dtype, bias.shape[1:], 0, 0),
    )
