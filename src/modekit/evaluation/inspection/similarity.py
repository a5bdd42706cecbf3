"""How alike the experts are: the cosine between what each changed of the base model, over all mixed tensors.

    cos(i, j) = <d_i, d_j> / (|d_i| |d_j|),   d_e = expert e's tensors - the base's, all in one long vector

Inner products add up tensor by tensor, block by block. A low-rank change s B A is never multiplied out:

    <s B A, t D C> = s t <B'D, A C'>        <D, s B A> = s <B'D, A>        (' transposes; A (R, I), B (O, R), D full)

Shape legend: E experts, O and I rows and columns of a tensor, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.sources import why_not
from modekit.errors import SourceError
from modekit.evaluation.finite import not_finite
from modekit.evaluation.inspection.result import Similarity
from modekit.planning.shape import FewBitsPart, MixedTensor, TensorPart
from modekit.run import QUIET, Run
from modekit.sources.contents import OpenFiles
from modekit.sources.header import TensorRef
from modekit.sources.names import HEAD, module_of, weight_of
from modekit.sources.source import open_source
from modekit.weights.few_bits import decoded
from modekit.weights.numeric import as_array, to_float32
from modekit.weights.stored import Stored

Array64 = npt.NDArray[np.float64]

_BLOCK = 2**18  # elements of one expert's tensor at a time: 2 MiB in float64


def similarity(checkpoint: Checkpoint, run: Run = QUIET) -> Similarity:
    """Compare the experts of a checkpoint; memory does not grow with the model.

    Two experts that changed nothing are alike (1); one that changed something and one that did not have 0. Where the base
    model's folder is gone and the checkpoint does not hold the base's tensors, the experts' tensors are compared as they are.
    Raises CheckpointError for weights that are not finite.
    """
    kept = list(checkpoint.shape.mixed_tensors(checkpoint.tensors))
    base, without_base = _base_tensors(checkpoint, kept, run)
    mixed = [_with_base(tensor, base, checkpoint) for tensor in kept]
    count = len(checkpoint.names)
    gram = np.zeros((count, count))
    with OpenFiles() as opened:
        for tensor in run.over("compare experts", mixed, len(mixed)):
            gram += _products(tensor, count, opened)
            if not np.isfinite(gram).all():
                raise not_finite("weights of an expert are", f"{checkpoint.folder}: {tensor.name}")
    whole = sum(bool(each.own) and each.base is None and not each.holds_changes for each in mixed)
    notes = []
    of = f"what the experts changed of the base model in {len(mixed)} tensors"
    if whole:
        of = f"the experts' own tensors ({whole} of {len(mixed)}) and what they changed of the base model in the others"
        of = of if whole < len(mixed) else f"the experts' own tensors ({len(mixed)})"
        why = without_base or f"it has {whole} of these tensors in another shape"
        notes.append(f"experts were compared whole, so that even unrelated changes look alike, without the base model: {why}")
    squares = zip(checkpoint.record.recipe.experts, np.diag(gram), strict=True)
    same = ", ".join(expert.name for expert, square in squares if square == 0 and not expert.is_base)
    if same:
        notes.append(
            f"{same} changed none of the tensors whose similarity is shown; changes of others (attention) are not compared"
        )
    return Similarity(_cosines(gram).tolist(), of, notes)


def _cosines(gram: Array64) -> Array64:
    norms = np.sqrt(np.maximum(np.diag(gram), 0.0))
    scale = np.outer(norms, norms)
    cosines: Array64 = np.clip(np.divide(gram, scale, out=np.zeros_like(gram), where=scale > 0), -1.0, 1.0)
    unchanged = norms == 0
    cosines[np.outer(unchanged, unchanged)] = 1.0
    np.fill_diagonal(cosines, 1.0)
    return cosines


def _products(tensor: MixedTensor, count: int, opened: OpenFiles) -> Array64:
    """Inner products of the experts' changes of one tensor, (E, E)."""

    def read(part: TensorPart, first: int, last: int) -> Array64:
        width = part.width or columns
        values = to_float32(Stored(opened, part.ref)[part.start + first * width : part.start + last * width])
        return values.astype(np.float64).reshape(-1, width)[:, :columns].ravel() / part.factor

    def whole(ref: TensorRef) -> Array64:
        return to_float32(as_array(opened.read(ref), ref.dtype)).astype(np.float64).reshape(ref.shape)

    def decode(part: FewBitsPart, first: int, last: int) -> Array64:
        shape = part.codes.shape
        width = shape[1] * shape[2]
        codes = Stored(opened, part.codes)[first * width : last * width].astype(np.uint8).reshape(-1, *shape[1:])
        steps = to_float32(Stored(opened, part.steps)[first:last])
        return decoded(codes, steps, columns).astype(np.float64).ravel()

    gram = np.zeros((count, count))
    rows, columns = tensor.shape[0], int(np.prod(tensor.shape[1:]))
    factors: dict[int, tuple[Array64, Array64]] = {}
    sides: dict[str, Array64] = {}
    for expert, low in tensor.low_rank.items():
        sides = sides or {"a": whole(low.a), "b": whole(low.b)}
        factors[expert] = (low.scale * sides["a"][low.ranks], sides["b"][:, low.ranks])
    for one, (a_one, b_one) in factors.items():
        for other, (a_other, b_other) in factors.items():
            gram[one, other] = np.sum((b_one.T @ b_other) * (a_one @ a_other.T))
    step = max(1, _BLOCK // columns)
    own = [*tensor.own, *tensor.few_bits]
    for first in range(0, rows if own else 0, step):
        last = min(rows, first + step)
        base = read(tensor.base, first, last) if tensor.base is not None else 0.0
        whole_changes = [read(part, first, last) - base for part in tensor.own.values()]
        changes = np.stack([*whole_changes, *(decode(part, first, last) for part in tensor.few_bits.values())])
        gram[np.ix_(own, own)] += changes @ changes.T
        for other, (a_other, b_other) in factors.items():
            for number, expert in enumerate(own):
                block = changes[number].reshape(last - first, columns)
                product = np.sum((b_other[first:last].T @ block) * a_other)
                gram[expert, other] += product
                gram[other, expert] += product
    return gram


def _base_tensors(checkpoint: Checkpoint, kept: Sequence[MixedTensor], run: Run) -> tuple[Mapping[str, TensorRef], str | None]:
    """Those of the base model, while it is what it was and the checkpoint does not have them all; and why there are none."""
    if all(mixed.base is not None or mixed.holds_changes for mixed in kept):
        return {}, None
    without_base = why_not(checkpoint, None, run=run)
    if without_base is not None:
        return {}, without_base
    folder = checkpoint.source_folder(checkpoint.record.sources[0])
    try:
        return open_source("base_model", str(folder), folder, run=Run(trust_remote_code=True)).tensors, None  # no code is run
    except SourceError as error:
        return {}, error.what


def _with_base(mixed: MixedTensor, tensors: Mapping[str, TensorRef], checkpoint: Checkpoint) -> MixedTensor:
    """What is compared, with the base's tensor: the checkpoint's own, or the base model's while its folder is there."""
    if mixed.base is not None or mixed.holds_changes:
        return mixed
    tied = weight_of(checkpoint.shape.family.embedding) if module_of(mixed.name) == HEAD else mixed.name
    ref = tensors.get(mixed.name, tensors.get(tied))
    return replace(mixed, base=TensorPart(ref)) if ref is not None and ref.shape == mixed.shape else mixed
