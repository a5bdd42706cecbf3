"""What a full model changes of its base, by the numbers of both, and what an adapter does, by its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate, takewhile
from typing import Literal

from modekit.files.read import UNREADABLE, read_json
from modekit.sources.adapter import AdapterSource, LowRank
from modekit.sources.contents import OpenFiles
from modekit.sources.family import Family
from modekit.sources.names import natural_key
from modekit.sources.source import SPECIALIST_FILE, ModelSource
from modekit.weights.flat import pieces_differ, same_bytes

Change = Literal["more", "ffn", "nothing"]
"""Its FFNs, more than these, or nothing."""
Changed = Callable[[ModelSource], Change]
_WHOLE = 2**30
"""The most bytes of a model that are compared whole."""


def is_gone(model: ModelSource) -> bool:
    """Whether it is only known by what its mixture says of it (members/change.py)."""
    return any(ref.state is None for ref in model.tensors.values())


def changes(base: ModelSource, model: ModelSource, family: Family) -> Change:
    """What a full model changes of its base: its FFNs, more than these, or nothing.

    A sample of each tensor finds most differences; where it finds none, whole tensors are compared: embedding and head first,
    of which a few rows may differ, up to so many bytes that a plan need not wait for the disk.
    """
    ffn = f".{family.decoder.ffn}."
    gone = is_gone(model)
    with OpenFiles() as opened:
        if not _changed_ffn_alone(model) and (gone or _differ(opened, base, model, lambda name: ffn not in name)):
            return "more"
        return "ffn" if gone or _differ(opened, base, model, lambda name: ffn in name) else "nothing"


def are_alike(one: ModelSource, other: ModelSource) -> bool:
    """Whether two models, or two adapters, hold the same numbers."""
    if _scales(one) != _scales(other):
        return False
    with OpenFiles() as opened:
        return not _differ(opened, one, other, lambda name: True)


def _scales(source: ModelSource) -> tuple[frozenset[str], Mapping[str, float]] | None:
    """Names of an adapter's tensors, and the scale of each change; None of a full model."""
    if not isinstance(source, AdapterSource):
        return None
    return frozenset(source.tensors), {name: each.scale for name, each in source.changes.items()}


def _changed_ffn_alone(source: ModelSource) -> bool:
    """Whether `modekit specialize` says that it trained nothing but the FFNs."""
    try:
        record = read_json(source.folder / SPECIALIST_FILE)
    except UNREADABLE:
        return False
    return isinstance(record, dict) and record.get("specialist") == "mlp"


def _differ(opened: OpenFiles, base: ModelSource, model: ModelSource, among: Callable[[str], bool]) -> bool:
    """Whether a tensor differs, of those that both have and that are asked for: layers first, where models differ soon."""
    names = [name for name in base.tensors.keys() & model.tensors.keys() if among(name)]
    names.sort(key=lambda name: (".layers." not in name, natural_key(name)))
    pairs = [(base.tensors[name], model.tensors[name]) for name in names]
    whole = takewhile(lambda size: size <= _WHOLE, accumulate(one.nbytes for one, _ in reversed(pairs)))
    return (
        any((one.dtype, one.shape) != (other.dtype, other.shape) for one, other in pairs)
        or any(pieces_differ(opened, *pair) for pair in pairs)
        or not all(same_bytes(opened, *pair) for pair, _ in zip(reversed(pairs), whole, strict=False))
    )


def touched(source: ModelSource, name: str) -> bool:
    """Whether an adapter does anything to a tensor of the base; a full model always has its own."""
    if not isinstance(source, AdapterSource):
        return True
    return name in source.changes or name in source.replaced


def low_rank(source: ModelSource, weight: str) -> LowRank | None:
    """The adapter's change of a weight when it can be kept low-rank: plain LoRA on a linear layer, nothing replaced."""
    bias = weight.removesuffix("weight") + "bias"
    if not isinstance(source, AdapterSource) or weight in source.replaced or bias in source.replaced:
        return None
    change = source.changes.get(weight)
    plain = isinstance(change, LowRank) and change.magnitude is None and not change.transposed and not change.experts
    return change if plain else None
