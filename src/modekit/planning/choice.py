"""The form of a result where a recipe leaves it open: a plain checkpoint wherever it carries what the experts know.

Of adapters of small rank a plain checkpoint carries all, and sizes decide. Of full models it carries the largest part: how much
is measured at a build (building/lost.py), which takes the modekit architecture where too little is left of an expert.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal

from modekit.files.disk import disk_of
from modekit.files.figures import bytes_of
from modekit.files.read import UNREADABLE, read_json, read_text
from modekit.planning.plan import Plan
from modekit.recipes.recipe import Recipe
from modekit.sources.contents import OpenFiles
from modekit.sources.family import Family
from modekit.sources.header import TensorRef
from modekit.sources.names import natural_key
from modekit.sources.source import SPECIALIST_FILE, ModelSource
from modekit.weights.flat import stored

MOST_LOST = 0.05
"""Of what an expert changes: a plain checkpoint that loses more of one is not taken."""
_PIECES, _NUMBERS = 64, 2**13  # of a tensor, that are looked at to see whether models differ: all of one that is no larger
_MEMORY = Path("/sys/fs/cgroup/memory.max")


def choose_form(plain: Plan, other: Plan) -> Plan:
    """Of a plan in each form that which is built, with `otherwise` where the build must measure first."""
    channels = plain.shape.channels
    sizes = f"{bytes_of(plain.bytes_written)}; {bytes_of(other.bytes_written)} in the modekit architecture"
    free = disk_of(plain.root / "OUT").free
    lacking = "memory" if plain.bytes_written > _memory() else "free disk" if plain.disk_needed > free > 0 else None
    if lacking and other.bytes_written < plain.bytes_written:
        takes = "--format plain, or format: plain in a recipe, takes it"
        return replace(other, why=f"a plain checkpoint would need more {lacking} than there is ({sizes}); {takes}")
    if channels is None or channels.carry is None or channels.carry.is_exact:
        return replace(plain, why=f"{plain.why} ({sizes})")
    measured = f"a plain checkpoint, if the build finds that it keeps {1 - MOST_LOST:.0%} of every expert ({sizes})"
    return replace(plain, why=measured, otherwise=other)


def _memory() -> int:
    """Bytes of this machine, or of the part of it that this process may have."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(*UNREADABLE):
        memory = min(memory, int(read_text(_MEMORY)))
    return memory


def whole_models(recipe: Recipe, sources: Sequence[ModelSource], family: Family) -> int:
    """How many experts are full models that differ from the base in more than their FFNs; 0 where the recipe says what becomes
    of that. `sources` begin with the base. Of a model that is gone, the recipe of its mixture says `carry: all` then.
    """
    if "modules" in recipe.mixture.model_fields_set or recipe.output.carry == "ffn":
        return 0
    full = [source for expert, source in zip(recipe.experts, sources[1:], strict=True) if expert.is_whole]
    carried = recipe.output.carry is not None
    return sum(carried if _is_gone(each) else changes(sources[0], each, family) == "more" for each in full)


def _is_gone(model: ModelSource) -> bool:
    """Whether it is only known by what its mixture says of it (members/change.py)."""
    return any(ref.state is None for ref in model.tensors.values())


def changes(base: ModelSource, model: ModelSource, family: Family) -> Literal["more", "ffn", "nothing"]:
    """What a full model changes of its base, by a sample of every tensor: its FFNs, more than these, or nothing."""
    ffn, gone = f".{family.mlp_module}.", _is_gone(model)
    with OpenFiles() as opened:
        if not _changed_ffn_alone(model) and (gone or _differ(opened, base, model, lambda name: ffn not in name)):
            return "more"
        if gone:
            return "ffn"
        return "ffn" if _differ(opened, base, model, lambda name: ffn in name) else "nothing"


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
    for name in sorted(names, key=lambda name: (".layers." not in name, natural_key(name))):
        one, other = base.tensors[name], model.tensors[name]
        if (one.dtype, one.shape) != (other.dtype, other.shape) or _pieces_differ(opened, one, other):
            return True
    return False


def _pieces_differ(opened: OpenFiles, one: TensorRef, other: TensorRef) -> bool:
    first, second = (stored(opened, each) for each in (one, other))
    step = max(_NUMBERS, -(-len(first) // _PIECES))
    parts = (slice(start, min(len(first), start + _NUMBERS)) for start in range(0, len(first), step))
    return any(first[part].tobytes() != second[part].tobytes() for part in parts)
