"""How the tensors and modules of a model are called: layers, embedding, head. The one place that takes names apart.

A module is what a name says without its last part: `model.layers.3.mlp.up_proj.weight` lies in the module
`model.layers.3.mlp.up_proj`, which is `mlp.up_proj` in layer 3. In a model with an encoder `model.encoder.layers.3.fc1` is
`fc1` in layer `encoder.3`; T5 calls its layers blocks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from modekit.recipes.layers import Layer, layer_at

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
FINAL_NORM = "model.norm"
LOGITS_BIAS = "final_logits_bias"
"""A tensor, and no module, that some models with an encoder add to what the head says."""
POSITIONS = ("embed_positions", "relative_attention_bias")
"""Last parts of modules that hold learned positions: embeddings, and no linear maps."""

_LAYERS = "model.layers."
_IN_STACK = re.compile(r"^(?:model\.)?(encoder|decoder)\.(?:layers|block)\.([0-9]{1,9})\.(.+)$", re.DOTALL)
_IN_LIST = re.compile(
    r"^(?!(?:model\.)?mtp\.)(?:[A-Za-z_]\w*\.)*?(?:layers?|h|blocks?|attentions|resblocks)\.([0-9]{1,9})\.(.+)$",
    re.DOTALL | re.ASCII,
)
"""Layers of any other class; those that only guess further tokens (`mtp`) are none."""
_FIRST = re.compile(r"^(model\.)?(shared|embed_tokens)(\.|$)")
_STACK = re.compile(r"^(?:model\.)?(encoder|decoder)\.")
_IGNORED = re.compile(
    r"(rotary_emb\.inv_freq|\.attention\.(masked_)?bias|^model\.(en|de)coder\.version"
    r"|EncDecAttention\.relative_attention_bias\.weight)$"
)


def in_layer(layer: int | str, path: str = "") -> str:
    """3, mlp.up_proj -> model.layers.3.mlp.up_proj; without a path, what all names of the layer begin with."""
    return f"{_LAYERS}{layer}.{path}"


def split_layer(name: str) -> tuple[Layer | None, str]:
    """model.layers.3.mlp.up_proj -> 3, mlp.up_proj; outside of the layers None and the name itself."""
    match = _IN_STACK.match(name)
    if match is not None:
        return layer_at(match[1], int(match[2])), match[3]
    match = _IN_LIST.match(name)
    return (int(match[1]), match[2]) if match is not None else (None, name)


def in_decoder(name: str) -> bool:
    """Whether something of a model with an encoder is in its decoder."""
    match = _STACK.match(name)
    return match is not None and match[1] == "decoder"


def layers_of(names: Iterable[str]) -> set[Layer]:
    """The layers that are named."""
    return {layer for layer, _ in map(split_layer, names) if layer is not None}


def weight_of(module: str) -> str:
    """lm_head -> lm_head.weight."""
    return f"{module}.weight"


def module_of(tensor: str) -> str:
    """lm_head.weight -> lm_head."""
    return tensor.rpartition(".")[0]


def is_ignored(tensor: str) -> bool:
    """Whether a tensor is a buffer that old versions of transformers saved and every model computes for itself."""
    return _IGNORED.search(tensor) is not None


def is_looked_up(module: str) -> bool:
    """Whether a module is an embedding, of tokens or positions, and no linear map."""
    return _FIRST.match(module) is not None or module.rpartition(".")[2] in ("embed_tokens", *POSITIONS)


def natural_key(name: str) -> tuple[object, ...]:
    """Sorts names as a model runs: embedding, layers by number (2 before 10), an encoder's first, what comes after them."""
    stack = _STACK.match(name)
    first = 0 if _FIRST.match(name) else 1 if name.startswith(_LAYERS) else 4 if stack is None else 2 + (stack[1] == "decoder")
    parts = re.split(r"([0-9]{1,18})", name)  # odd ones are digits, few enough for a number of any length to be one
    return (first, *((0, int(part), "") if place % 2 else (1, 0, part) for place, part in enumerate(parts)))
