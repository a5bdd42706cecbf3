"""How the tensors and modules of a decoder are called: layers, embedding, head. The one place that takes names apart.

A module is what a name says without its last part: `model.layers.3.mlp.up_proj.weight` lies in the module
`model.layers.3.mlp.up_proj`, which is `mlp.up_proj` in layer 3.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
FINAL_NORM = "model.norm"

_LAYERS = "model.layers."
_IN_LAYER = re.compile(r"^model\.layers\.([0-9]{1,9})\.(.+)$", re.DOTALL)
_IGNORED = re.compile(r"(rotary_emb\.inv_freq|\.attention\.(masked_)?bias)$")


def in_layer(layer: int | str, path: str = "") -> str:
    """3, mlp.up_proj -> model.layers.3.mlp.up_proj; without a path, what all names of the layer begin with."""
    return f"{_LAYERS}{layer}.{path}"


def split_layer(name: str) -> tuple[int | None, str]:
    """model.layers.3.mlp.up_proj -> 3, mlp.up_proj; outside of the layers None and the name itself."""
    match = _IN_LAYER.match(name)
    return (int(match[1]), match[2]) if match is not None else (None, name)


def in_decoder(name: str) -> bool:
    """Whether something of a model with an encoder is in its decoder."""
    return name.removeprefix("model.").startswith("decoder.")


def layers_of(names: Iterable[str]) -> int:
    """How many layers there are, by the deepest one that is named."""
    return 1 + max((layer for layer, _ in map(split_layer, names) if layer is not None), default=-1)


def weight_of(module: str) -> str:
    """lm_head -> lm_head.weight."""
    return f"{module}.weight"


def module_of(tensor: str) -> str:
    """lm_head.weight -> lm_head."""
    return tensor.rpartition(".")[0]


def within(module: str, tensor: str) -> str:
    """A tensor's name inside its module; of a tied head, which bears the embedding's name, the last part."""
    return tensor.removeprefix(f"{module}.") if tensor.startswith(f"{module}.") else tensor.rpartition(".")[2]


def is_ignored(tensor: str) -> bool:
    """Whether a tensor is a buffer that old versions of transformers saved and every model computes for itself."""
    return _IGNORED.search(tensor) is not None


def natural_key(name: str) -> tuple[object, ...]:
    """Sorts names as a model runs: embedding, layers by number (2 before 10), what comes after them."""
    first = 0 if name.startswith(EMBEDDING) else 1 if name.startswith(_LAYERS) else 2
    parts = re.split(r"([0-9]{1,18})", name)  # odd ones are digits, few enough for a number of any length to be one
    return (first, *((0, int(part), "") if place % 2 else (1, 0, part) for place, part in enumerate(parts)))
