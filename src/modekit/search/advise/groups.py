"""Which group a tensor of the base model belongs to, by where its family keeps things, never by a word in its name.

ffn         what lies in the FFN of its layer: in one module, or in those that the layer calls itself
attention   what mixes tokens: every other module of a layer that has modules of its own, their norms included
embeddings  the embedding, and with tied embeddings the head; of a model with an encoder learned positions, too
head        the head, and what a model with an encoder adds to what it says
norms       all that is left
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from modekit.planning.places import ATTENTION
from modekit.sources.compatibility import own_names
from modekit.sources.family import Family, Stack
from modekit.sources.model import ModelSource
from modekit.sources.names import HEAD, LOGITS_BIAS, is_looked_up, module_of, split_layer

Group = Literal["ffn", "attention", "norms", "embeddings", "head"]
GROUPS: tuple[Group, ...] = ("ffn", "attention", "norms", "embeddings", "head")
_LINEAR_ATTENTION = ("q", "k", "v", "o")


def groups_of(base: ModelSource, family: Family) -> dict[str, Group]:
    """Name of every tensor of the base model -> its group. A tied head is no tensor of its own."""
    names = own_names(base, family)
    inside = {name: path for name in names for layer, path in [split_layer(name)] if layer is not None}
    blocks = {path.split(".")[0] for path in inside.values() if path.count(".") > 1}  # modules that have modules

    def group(name: str) -> Group:
        layer, path = split_layer(name)
        if layer is not None:
            stack = family.stack_of(layer)
            if _lies_in(path, stack.ffn_modules):
                return "ffn"
            return "attention" if _lies_in(path, _attention(stack) if family.pair else blocks) else "norms"
        if is_looked_up(module_of(name)):
            return "embeddings"
        return "head" if module_of(name) == HEAD or name == LOGITS_BIAS else "norms"

    return {name: group(name) for name in names}


def is_projection(name: str, family: Family) -> bool:
    """Whether a tensor is one of the attention parts that advice names (q, k, v, o)."""
    layer, path = split_layer(name)
    if layer is None:
        return False
    parts = family.stack_of(layer).parts
    return module_of(path) in {parts[part] for part in _LINEAR_ATTENTION}


def _attention(stack: Stack) -> set[str]:
    """Modules of a layer that hold the parts which mix tokens; T5 numbers what holds these, and keeps norms beside them."""
    return {module_of(stack.parts[part]) for part in ATTENTION if part in stack.parts}


def _lies_in(path: str, modules: Collection[str]) -> bool:
    return any(path.startswith(f"{module}.") for module in modules)
