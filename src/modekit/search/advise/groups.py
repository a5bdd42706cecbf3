"""Which group a tensor of the base model belongs to, by where its family keeps things, never by a word in its name.

ffn         what lies in the family's FFN module
attention   what mixes tokens: every other module of a layer that has modules of its own, their norms included
embeddings  the embedding, and with tied embeddings the head
head        the head
norms       all that is left
"""

from __future__ import annotations

import re
from typing import Literal

from modekit.planning.make import EMBEDDING, HEAD
from modekit.sources.compatibility import IGNORED, is_tied
from modekit.sources.families import Family
from modekit.sources.model import ModelSource

Group = Literal["ffn", "attention", "norms", "embeddings", "head"]
GROUPS: tuple[Group, ...] = ("ffn", "attention", "norms", "embeddings", "head")
_IN_LAYER = re.compile(r"^model\.layers\.\d+\.(.+)$")
_LINEAR_ATTENTION = ("q", "k", "v", "o")


def groups_of(base: ModelSource, family: Family) -> dict[str, Group]:
    """Name of every tensor of the base model -> its group. A tied head is no tensor of its own."""
    tied = is_tied(base, family)
    names = [name for name in base.tensors if not IGNORED.search(name) and not (tied and name == HEAD)]
    inside = {name: match[1] for name in names if (match := _IN_LAYER.match(name))}
    blocks = {path.split(".")[0] for path in inside.values() if path.count(".") > 1}  # modules that have modules

    def group(name: str) -> Group:
        path = inside.get(name)
        if path is not None:
            if path.startswith(f"{family.mlp_module}."):
                return "ffn"
            return "attention" if path.split(".")[0] in blocks else "norms"
        if _module(name) == _module(EMBEDDING):
            return "embeddings"
        return "head" if _module(name) == _module(HEAD) else "norms"

    return {name: group(name) for name in names}


def is_projection(name: str, family: Family) -> bool:
    """Whether a tensor is one of the attention parts that a recipe can name (q, k, v, o)."""
    match = _IN_LAYER.match(name)
    return match is not None and _module(match[1]) in {family.parts[part] for part in _LINEAR_ATTENTION}


def _module(name: str) -> str:
    return name.rpartition(".")[0]
