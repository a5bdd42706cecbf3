"""Every tensor of a checkpoint made again from its sources: what is copied, cast, scaled, folded, merged, widened or zero comes
out bit for bit.

Low-rank parts of full models (`as: lora`) do so on the kind of processor that built them. Elsewhere the factors may be
turned or differ in their last bits; what counts is their product, the change that an expert makes. What a native checkpoint
carries besides FFNs is computed with the bases that it keeps, and may differ in its last bits, too.

Shape legend: O, I rows and columns of a weight, R ranks of all experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from modekit.building.carrying import Carrying, carried_of
from modekit.checkpoint.carried import CARRIED_FILE, carried_digest
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.errors import SourceError
from modekit.planning.plan import Plan
from modekit.planning.tensors import PlannedTensor
from modekit.run import Run
from modekit.sources.contents import OpenFiles
from modekit.weights.made import Factor, Join
from modekit.weights.numeric import as_array, to_float32
from modekit.weights.reading import WeightReader
from modekit.weights.stored import read_float32

_ALIKE = {"F32": 1e-4, "F16": 5e-3, "BF16": 2e-2}
"""Dtype of factors -> largest difference of two products, as a share of the product: some roundings of the dtype."""

Array = npt.NDArray[np.generic]
Verdict = Literal["proven", "failed", "not possible"]


@dataclass(frozen=True)
class Check:
    """One line of the proof."""

    name: str
    verdict: Verdict
    detail: str


def check_made(checkpoint: Checkpoint, plan: Plan, opened: OpenFiles, run: Run) -> list[Check]:
    """Compare every tensor, gates and trained ones aside, with what the recipe makes of its sources."""
    read = WeightReader(opened, plan.models)
    tensors = [each for each in plan.tensors if each.role != "router" and each.name not in checkpoint.record.trained]
    copied, computed = [[each for each in tensors if (each.copied is None) is made] for made in (False, True)]
    done, total = 0, sum(each.nbytes for each in tensors)
    wrong, alike = {True: "", False: _wrong_bases(checkpoint, plan, read)}, dict[str, None]()
    for tensor in [*copied, *computed]:
        is_copied = tensor.copied is not None
        if wrong[is_copied]:
            continue
        if not _is_same(checkpoint, tensor, read):
            if isinstance(tensor.made, Join) and any(isinstance(part, Factor) for part in tensor.made.of):
                alike[tensor.name.rpartition(".")[0]] = None
            else:
                wrong[is_copied] = tensor.name
        done += tensor.nbytes
        run.progress("compare", done, total)
    wrong[False] = wrong[False] or next((each for each in alike if not _same_change(checkpoint, plan, each, read)), "")
    return [_of_copies(wrong[True], copied), _of_computed(wrong[False], len(computed), len(alike))]


def _of_copies(wrong: str, copied: list[PlannedTensor]) -> Check:
    if wrong:
        return Check("copied tensors", "failed", f"{wrong} differs from its source")
    total = sum(tensor.nbytes for tensor in copied)
    return Check("copied tensors", "proven", f"{len(copied)} tensors, {total:,} bytes, bit for bit")


def _of_computed(wrong: str, count: int, alike: int) -> Check:
    if wrong:
        return Check("computed tensors", "failed", f"{wrong} is not what the recipe makes of its sources")
    detail = f"{count} cast, scaled, folded, merged, widened or zero tensors computed again"
    if alike:
        detail += f"; low-rank parts of {alike} modules give the same change in other bits (another processor)"
    return Check("computed tensors", "proven", detail)


def _wrong_bases(checkpoint: Checkpoint, plan: Plan, read: WeightReader) -> str:
    """What is wrong with the bases by which more than FFNs is carried; else they are read."""
    record, planned = checkpoint.record.carry, plan.shape.channels and plan.shape.channels.carry
    if record is None:
        return ""
    if not planned or dict(planned) != record.model_dump(exclude={"sha256"}):
        return "carry in modekit.json"
    try:
        if carried_digest(checkpoint.folder) == record.sha256:
            read.fills = Carrying(plan, read, carried_of(plan, checkpoint.folder)).fill
            return ""
    except SourceError:
        pass
    return CARRIED_FILE


def _is_same(checkpoint: Checkpoint, tensor: PlannedTensor, read: WeightReader) -> bool:
    ref, pad = checkpoint.tensors.get(tensor.name), tensor.pad
    if ref is None or ref.nbytes != tensor.nbytes:
        return False
    start = 0
    for block in tensor.blocks(read):
        found = np.frombuffer(read.opened.read(ref, start, start + len(block)), np.uint8)
        start += len(block)
        if pad is None:
            if not np.array_equal(found, np.frombuffer(block, np.uint8)):
                return False
            continue
        ours, theirs = (as_array(view, tensor.dtype).reshape(-1, tensor.shape[-1]) for view in (found.data, block))
        if pad.free is not None:  # what the router's fit wrote is not of the recipe alone
            ours = ours.copy()
            ours[:, pad.free] = 0
        if not (_alike(tensor, ours, theirs) if pad.carried is not None else ours.tobytes() == theirs.tobytes()):
            return False
    return True


def _alike(tensor: PlannedTensor, ours: Array, theirs: Array) -> bool:
    """Whether whole rows have the base's numbers as they are, and the new ones up to some roundings."""
    assert tensor.pad is not None
    columns = tensor.shape[-1] - tensor.pad.columns
    parts = [(to_float32(ours[:, cut]), to_float32(theirs[:, cut])) for cut in (slice(columns), slice(columns, None))]
    return all(
        bool(np.linalg.norm(one - other) <= _ALIKE[tensor.dtype] * np.linalg.norm(other)) for one, other in parts if one.size
    )


def _same_change(checkpoint: Checkpoint, plan: Plan, module: str, read: WeightReader) -> bool:
    """Whether B A of every expert is what its source gives."""
    a, b = (next(t for t in plan.tensors if t.name == f"{module}.lora_{side}") for side in "AB")
    here = [checkpoint.tensors.get(tensor.name) for tensor in (a, b)]
    if [(ref.dtype, ref.shape) for ref in here if ref is not None] != [(tensor.dtype, tensor.shape) for tensor in (a, b)]:
        return False
    a_RI, b_OR = (read_float32(read.opened, checkpoint.tensors[tensor.name]) for tensor in (a, b))
    start = 0
    for made_a, made_b in zip(a.made.parts, b.made.parts, strict=True):
        again_RI = to_float32(made_a.numbers(read)[:]).reshape(-1, a.shape[1])
        again_OR = to_float32(made_b.numbers(read)[:]).reshape(b.shape[0], -1)
        stop = start + len(again_RI)
        again_OI, found_OI = again_OR @ again_RI, b_OR[:, start:stop] @ a_RI[start:stop]
        if not np.linalg.norm(found_OI - again_OI) <= _ALIKE[a.dtype] * np.linalg.norm(again_OI):
            return False
        start = stop
    return True
