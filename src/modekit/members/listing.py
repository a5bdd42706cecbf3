"""Who is in a mixture: since when, what each is worth, and under which licence. Nothing is run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.record import Change
from modekit.evaluation.results import Results
from modekit.files.read import UNREADABLE
from modekit.files.typed import Label, read_as
from modekit.members.licences import sources_of
from modekit.recipes.recipe import Expert
from modekit.sources.header import ITEMSIZE
from modekit.sources.source import SPECIALIST_FILE


class ListedExpert(BaseModel, frozen=True):
    """One expert.

    Attributes:
        name: of it and its domain.
        kind: full model, adapter, low-rank part or base, and who taught it, if a teacher did.
        source: as the recipe names it.
        since: the day on which it came; None for one that was there from the start.
        nbytes: of tensors that are its own, or its part of those that it shares with others.
        gain: loss of the base less that of the mixture on its domain, nats per token; None when it was not evaluated.
        gap_closed: share of its own gain that the mixture has; None likewise.
        licence: as its own files say.
    """

    name: str
    kind: str
    source: str
    since: str | None
    nbytes: int
    gain: float | None
    gap_closed: float | None
    licence: str


def members_of(checkpoint: Checkpoint) -> list[ListedExpert]:
    """Every expert in recipe order. Raises CheckpointError when the files are damaged."""
    record = checkpoint.record
    since, results = _since(record.history), Results.find(checkpoint)
    licences = {name.removeprefix("expert "): source.said for source in sources_of(checkpoint) for name in source.used_as}
    experts = []
    for expert, size, teacher in zip(record.recipe.experts, _sizes(checkpoint), teachers_of(checkpoint), strict=True):
        gain, gap_closed = _worth(results, expert.name)
        experts.append(
            ListedExpert(
                name=expert.name,
                kind=_kind(expert, teacher),
                source=expert.source,
                since=since.get(expert.name),
                nbytes=size,
                gain=gain,
                gap_closed=gap_closed,
                licence=licences.get(expert.name, licences.get("base model", "")),
            )
        )
    return experts


def _since(history: Sequence[Change]) -> dict[str, str]:
    """Name -> the day on which the expert that bears it came, or was replaced last."""
    since: dict[str, str] = {}
    for change in history:
        if change.what in {"add", "replace"}:
            since[change.expert] = change.on
        elif change.what == "remove":
            since.pop(change.expert, None)
    return since


def _kind(expert: Expert, teacher: str | None) -> str:
    if expert.is_base:
        return "base"
    if expert.adapter is not None:
        kind = "adapter"
    else:
        kind = f"rank {expert.lora_rank} of a model" if expert.lora_rank else "full model"
        kind = kind if expert.bits is None else f"{expert.bits} bits of a model"
    return kind if teacher is None else f"{kind}, distilled from {teacher}"


def _sizes(checkpoint: Checkpoint) -> list[int]:
    """Bytes per expert."""
    sizes = [0] * len(checkpoint.names)
    for mixed in checkpoint.shape.mixed_tensors(checkpoint.tensors):
        for number, part in mixed.own.items():
            sizes[number] += math.prod(mixed.shape) * ITEMSIZE[part.ref.dtype]
        for number, few in mixed.few_bits.items():
            sizes[number] += few.codes.nbytes + few.steps.nbytes
        for number, low_rank in mixed.low_rank.items():
            rank = low_rank.ranks.stop - low_rank.ranks.start
            rows = low_rank.a.shape[1] + low_rank.b.shape[0]
            sizes[number] += rank * rows * ITEMSIZE[low_rank.a.dtype]
    return sizes


def _worth(results: Results | None, domain: str) -> tuple[float | None, float | None]:
    """Gain over the base and gap closed on a domain, of the mixture as it is."""
    rows = {row.kind: row for row in reversed(results.rows)} if results is not None else {}  # of several mixtures the first
    base, mixture = rows.get("base"), rows.get("mixture")
    if base is None or mixture is None or domain not in mixture.scores or domain not in base.scores:
        return None, None
    return base.scores[domain].loss - mixture.scores[domain].loss, mixture.scores[domain].gap_closed


class _Teacher(BaseModel):
    name: Label


class _Specialist(BaseModel):
    teacher: _Teacher | None = None


def teachers_of(checkpoint: Checkpoint) -> list[str | None]:
    """Per expert in recipe order the name of its teacher (`modekit specialize --teacher`), as its own folder says."""
    record = checkpoint.record
    return [teacher_of(checkpoint.source_folder(record.sources[place])) for place in record.expert_sources]


def teacher_of(folder: Path) -> str | None:
    """Name of the teacher of the model in a folder; None without one, or where nothing can be read."""
    try:
        specialist = read_as(folder / SPECIALIST_FILE, _Specialist)
    except UNREADABLE:
        return None
    return None if specialist.teacher is None else specialist.teacher.name
