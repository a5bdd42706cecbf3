"""What of a plan is there already: by its digest the shards of a build that was killed, and what a mixture has that is changed.

The tensors of that are taken from it, not made again. Two plans are compared, of the mixture as it is and as it is to be, over
the same sources: a tensor of the second that the first makes in the same way of the same experts is in the checkpoint; of many
experts in one tensor, each one's part of it. So what comes out is what a build of the second plan gives, but what a training
has moved stays moved.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from modekit.files.write import digest_of_data
from modekit.planning.plan import Plan, Reused
from modekit.planning.tensors import PlannedTensor, Shard
from modekit.sources.header import ITEMSIZE, TensorRef
from modekit.sources.source import ModelSource
from modekit.weights.made import Columns, Copy, Join, Made

Origins = Sequence[int | None]
"""Per expert of the new mixture its number in the old one; None for one that is new."""
_NUMBER = re.compile(r"\.(experts|differences)\.(\d+)\.")


def digest_of(plan: Plan) -> str:
    """Identity of a build: version, recipe, every planned tensor, and what every source file was when it was planned."""
    states = {**plan.source_states, **({} if plan.reused is None else plan.reused.model.states)}
    identity = {
        "modekit": version("modekit"),
        "recipe": plan.recipe.digest(),
        "config": dict(plan.shape.config),
        "tensors": list(map(repr, plan.tensors)),
        "otherwise": plan.otherwise and digest_of(plan.otherwise),
        "files": [
            [str(file), state and [state.inode, state.size, state.modified_ns, state.changed_ns]]
            for file, state in states.items()
        ],
    }
    return digest_of_data(identity)


def reusing(folder: Path, tensors: Mapping[str, TensorRef], before: Plan, after: Plan, origins: Origins) -> Plan:
    """The plan `after` that takes what `before` has made, which are the tensors of a checkpoint in `folder`."""
    model = ModelSource("the mixture", str(folder), folder, None, {}, tensors)
    finder = _Finder(model, before, after, origins)
    names: dict[str, str] = {}
    shards = []
    for shard in after.shards:
        found = [finder.taken(tensor) for tensor in shard.tensors]
        names |= {tensor.name: was for tensor, was in found if was is not None}
        shards.append(replace(shard, tensors=tuple(tensor for tensor, _ in found)))
    files: dict[Path, list[TensorRef]] = {}
    for ref in sorted(tensors.values(), key=lambda ref: ref.start):
        files.setdefault(ref.file, []).append(ref)
    there = frozenset(shard.file for shard in shards if _is_there(shard, files.get(folder / shard.file, [])))
    return replace(after, shards=tuple(shards), reused=Reused(model, there, names, after.shards))


def _is_there(shard: Shard, there: Sequence[TensorRef]) -> bool:
    """Whether the tensors of a file are just a shard's, all taken from it, under their names and in their order."""
    taken = [tensor.made for tensor in shard.tensors]
    return taken == [Copy(ref) for ref in there] and [tensor.name for tensor in shard.tensors] == [ref.name for ref in there]


def _key(tensor: PlannedTensor, origins: Origins, inner: int) -> tuple[int | None, str]:
    """What a tensor is, whatever number its expert has; `inner`: how many each has of its own."""
    if tensor.expert is None:
        return None, tensor.name
    return origins[tensor.expert], _NUMBER.sub(lambda found: f".{found[1]}.{int(found[2]) % inner}.", tensor.name)


class _Finder:
    """Finds in the checkpoint what a new plan asks for; the checkpoint is the last of the plan's models."""

    def __init__(self, model: ModelSource, before: Plan, after: Plan, origins: Origins) -> None:
        self._model = model
        self._origins = origins
        experts = zip(after.sources[1:], origins, strict=True)
        self._new = {file for source, origin in experts if origin is None for file in source.files} - {*after.sources[0].files}
        self._same = range(before.shape.experts)
        self._inner = after.shape.inner
        self._old = {_key(tensor, self._same, self._inner): tensor for shard in before.shards for tensor in shard.tensors}

    def taken(self, tensor: PlannedTensor) -> tuple[PlannedTensor, str | None]:
        """The tensor with the checkpoint in place of its sources where that has it, and its name there."""
        was = self._old.get(_key(tensor, self._origins, self._inner))
        ref = None if was is None else self._model.tensors.get(was.name)
        if was is None or ref is None or (ref.dtype, ref.shape) != (was.dtype, was.shape):
            return tensor, None
        carried = tensor.pad is not None and tensor.pad.carried is not None
        if carried and [*self._origins] != [*self._same]:  # bases are of all experts
            return tensor, None
        is_same = (tensor.dtype, tensor.shape, tensor.made) == (was.dtype, was.shape, was.made)
        if is_same and self._new.isdisjoint(read.file for read in tensor.made.refs):
            return replace(tensor, made=Copy(ref)), was.name
        made = self._in_parts(tensor.made, was.made, ref)
        return replace(tensor, made=made), None if made is tensor.made else was.name

    def _in_parts(self, made: Made, was: Made, ref: TensorRef) -> Made:
        """Many experts in one tensor: from the checkpoint the parts of those that were there."""
        if not (isinstance(made, Join) and isinstance(was, Join)) or made.axis != was.axis:
            return made
        there = dict(zip(_parts(was, self._same), _stored_parts(was, ref), strict=True))
        pairs = zip(made.of, _parts(made, self._origins), strict=True)
        found = tuple(part if key[0] is None else there.get(key, part) for part, key in pairs)
        return made if found == made.of else replace(made, of=found)


def _parts(made: Join, origins: Origins) -> list[tuple[object, ...]]:
    """Per part whose it is, by that one's number in the old mixture (None: a new one's), which of its parts, and how made."""
    keys: list[tuple[object, ...]] = []
    for place, (expert, part) in enumerate(zip(made.experts, made.of, strict=True)):
        number = made.experts[:place].count(expert)
        keys.append((None if expert is None else origins[expert], number, repr(part)))
    return keys


def _stored_parts(made: Join, ref: TensorRef) -> Iterator[Copy | Columns]:
    """Every part where it lies in a stored tensor."""
    position = 0
    size = ITEMSIZE[ref.dtype]
    for part in made.of:
        stop = position + (part.shape[1] if made.axis else math.prod(part.shape))
        if made.axis:
            yield Columns(ref, position, stop)
        else:
            start, end = (ref.start + each * size for each in (position, stop))
            yield Copy(replace(ref, shape=(stop - position,), start=start, end=end))
        position = stop
