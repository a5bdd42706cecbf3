"""How many parameters a mixture has, in all and at work."""

from __future__ import annotations

import re

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.sources.families import LAYER

_OWN = re.compile(r"\.experts\.\d+\.")


def parameters_of(checkpoint: Checkpoint) -> tuple[int, int, int]:
    """Parameters: in all, active per token, and of a dense model of the family."""
    total, per_expert, dense = _parameters(checkpoint)
    return total, total - per_expert * (len(checkpoint.names) - checkpoint.record.recipe.top_k), dense


def _parameters(checkpoint: Checkpoint) -> tuple[int, int, int]:
    """Of the mixture, of what it has once per expert, and of a dense model of the family."""
    total = sum(ref.numel for ref in checkpoint.tensors.values())
    if checkpoint.native is None:
        own = sum(ref.numel for name, ref in checkpoint.tensors.items() if _OWN.search(name))
        return total, own // len(checkpoint.names), checkpoint.record.dense_parameters
    router = sum(checkpoint.tensors[slot.name].numel for slot in checkpoint.slots)
    native, layers = checkpoint.native, range(checkpoint.layers)
    constants = sum(checkpoint.tensors[LAYER.format(layer=i) + c.name].numel for i in layers for c in native.constants)
    names = list(native.fused or [name.format(expert=0) for name in (native.experts or {}).values()])
    ffn = sum(checkpoint.tensors[LAYER.format(layer=layer) + name].numel for layer in layers for name in names)
    per_expert = ffn // len(checkpoint.names) if native.fused else ffn
    return total, per_expert, total - router - constants - per_expert * (len(checkpoint.names) - 1)
