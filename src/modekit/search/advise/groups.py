"""Which group a tensor of the base model belongs to, by where its family keeps things, never by a word in its name.

ffn         what lies in the family's FFN module
attention   what mixes tokens: every other module of a layer that has modules of its own, their norms included
embeddings  the embedding, and with tied embeddings the head
head        the head
norms       all that is left
"""

from __future__ import annotations

from typing import Literal

from modekit.sources.compatibility import own_names
from modekit.sources.family import Family
from modekit.sources.model import ModelSource
from modekit.sources.names import EMBEDDING, HEAD, module_of, split_layer

Group = Literal["ffn", "attention", "norms", "embeddings", "head"]
GROUPS: tuple[Group, ...] = ("ffn", "attention", "norms", "embeddings", "head")
_LINEAR_ATTENTION = ("q", "k", "v", "o")


def groups_of(base: ModelSource, family: Family) -> dict[str, Group]:
    """Name of every tensor of the base model -> its group. A tied head is no tensor of its own."""
    names = own_names(base, family)
    inside = {name: path for name in names for layer, path in [split_layer(name)] if layer is not None}
    blocks = {path.split(".")[0] for path in inside.values() if path.count(".") > 1}  # modules that have modules

    def group(name: str) -> Group:
        path = inside.get(name)
        if path is not None:
            if path.startswith(f"{family.mlp_module}."):
                return "ffn"
            return "attention" if path.split(".")[0] in blocks else "norms"
        if module_of(name) == EMBEDDING:
            return "embeddings"
        return "head" if module_of(name) == HEAD else "norms"

    return {name: group(name) for name in names}


def is_projection(name: str, family: Family) -> bool:
    """Whether a tensor is one of the attention parts that a recipe can name (q, k, v, o)."""
    layer, path = split_layer(name)
    return layer is not None and module_of(path) in {family.parts[part] for part in _LINEAR_ATTENTION}
