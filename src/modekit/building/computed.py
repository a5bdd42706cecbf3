"""Computed tensors of a checkpoint computed again: cast, scaled, folded, merged and zero ones come out bit for bit.

Low-rank parts of full models (`as: lora`) do so on the kind of processor that built them. Elsewhere the factors may be
turned or differ in their last bits; what counts is their product, the change that an expert makes. What a native checkpoint
carries besides FFNs is computed with the bases that it keeps, and may differ in its last bits, too.

Shape legend: O, I rows and columns of a weight, R ranks of all experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from modekit.building.carrying import Carrying, carried_of
from modekit.building.tensors import PieceReader, computed_blocks, free_part
from modekit.checkpoint.carried import CARRIED_FILE, carried_digest
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.errors import SourceError
from modekit.planning.pieces import PlannedTensor
from modekit.planning.plan import Plan
from modekit.run import Run
from modekit.sources.contents import OpenFiles
from modekit.weights.numeric import as_array, to_float32
from modekit.weights.stored import read_float32

_ALIKE = {"F32": 1e-4, "F16": 5e-3, "BF16": 2e-2}
"""Dtype of factors -> largest difference of two products, as a share of the product: some roundings of the dtype."""


@dataclass(frozen=True)
class ComputedAgain:
    """How many tensors were computed again, in how many modules low-rank parts were alike but not the same bits, and the
    first tensor that is wrong.
    """

    count: int
    alike: int = 0
    wrong: str | None = None


def compute_again(checkpoint: Checkpoint, plan: Plan, opened: OpenFiles, run: Run) -> ComputedAgain:
    """Compare every computed tensor, gates and trained ones aside, with what the recipe makes of its sources."""
    trained = checkpoint.record.trained
    computed = [t for t in plan.tensors if t.role != "router" and t.operation != "copy" and t.name not in trained]
    read = PieceReader(opened)
    if checkpoint.record.carry is not None:
        planned = None if plan.shape.channels is None else plan.shape.channels.carry
        if planned is None or dict(planned) != checkpoint.record.carry.model_dump(exclude={"sha256"}):
            return ComputedAgain(0, wrong="carry in modekit.json")
        if carried_digest(checkpoint.folder) != checkpoint.record.carry.sha256:
            return ComputedAgain(0, wrong=CARRIED_FILE)
        try:
            read.fills = Carrying(plan, read, carried_of(plan, checkpoint.folder)).fill
        except SourceError:
            return ComputedAgain(0, wrong=CARRIED_FILE)
    total, done = sum(tensor.nbytes for tensor in computed), 0
    factored: dict[str, None] = {}
    for tensor in computed:
        if not _same_bits(checkpoint, plan, tensor, read):
            if tensor.operation == "bits" or not any(piece.factor is not None for piece in tensor.pieces):
                return ComputedAgain(len(computed), wrong=tensor.name)
            factored[tensor.name.rpartition(".")[0]] = None
        done += tensor.nbytes
        run.progress("compute again", done, total)
    wrong = next((module for module in factored if not _same_change(checkpoint, plan, module, read)), None)
    return ComputedAgain(len(computed), len(factored), wrong)


def _same_bits(checkpoint: Checkpoint, plan: Plan, tensor: PlannedTensor, read: PieceReader) -> bool:
    ref = checkpoint.tensors.get(tensor.name)
    if ref is None or ref.nbytes != tensor.nbytes:
        return False
    start = 0
    for block in computed_blocks(plan, tensor, read):
        found = read.opened.read(ref, start, start + len(block))
        if tensor.pad is not None and tensor.pad.free is not None:  # what the router's fit wrote is not of the recipe alone
            found = free_part(tensor.pad, tensor.dtype, tensor.shape[1], found).data.cast("B")
        if tensor.pad is not None and tensor.pad.carried is not None:
            if not _alike(tensor, found, block):
                return False
        elif not np.array_equal(np.frombuffer(found, np.uint8), np.frombuffer(block, np.uint8)):
            return False
        start += len(block)
    return True


def _alike(tensor: PlannedTensor, found: memoryview, again: memoryview) -> bool:
    """Whether a block of whole rows has the base's numbers as they are, and the new ones up to some roundings."""
    assert tensor.inner is not None
    columns, wide = tensor.inner.shape[-1], tensor.shape[-1]
    ours, theirs = (to_float32(as_array(view, tensor.dtype)).reshape(-1, wide) for view in (found, again))
    parts = ((ours[:, :columns], theirs[:, :columns]), (ours[:, columns:], theirs[:, columns:]))
    return all(
        bool(np.linalg.norm(one - other) <= _ALIKE[tensor.dtype] * np.linalg.norm(other)) for one, other in parts if one.size
    )


def _same_change(checkpoint: Checkpoint, plan: Plan, module: str, read: PieceReader) -> bool:
    """Whether B A of every expert is what its source gives."""
    a, b = (next(t for t in plan.tensors if t.name == f"{module}.lora_{side}") for side in "AB")
    here = [checkpoint.tensors.get(tensor.name) for tensor in (a, b)]
    if [(ref.dtype, ref.shape) for ref in here if ref is not None] != [(tensor.dtype, tensor.shape) for tensor in (a, b)]:
        return False
    a_RI, b_OR = (read_float32(read.opened, checkpoint.tensors[tensor.name]) for tensor in (a, b))
    start = 0
    for piece_a, piece_b in zip(a.pieces, b.pieces, strict=True):
        again_RI = to_float32(read.values(piece_a)[:]).reshape(-1, a.shape[1])
        again_OR = to_float32(read.values(piece_b)[:]).reshape(b.shape[0], -1)
        stop = start + len(again_RI)
        again_OI, found_OI = again_OR @ again_RI, b_OR[:, start:stop] @ a_RI[start:stop]
        if not np.linalg.norm(found_OI - again_OI) <= _ALIKE[a.dtype] * np.linalg.norm(again_OI):
            return False
        start = stop
    return True
