"""The routers of a checkpoint by name, and the weights they give: what the layers use, not logits.

Shape legend: B batch, S sequence, D width, E experts, R routers, O output features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from modekit.architecture.modekit_router import select
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.loaded.trace import RouterTrace
from modekit.planning.modekit import slots_of
from modekit.planning.plan import RouterSlot
from modekit.sources.families import LAYER

_IN_LAYER = LAYER.format(layer="")[:-1]  # model.layers.
_TINY = 1e-30


@dataclass(frozen=True)
class RouterPlace:
    """Where a router stands: its gate's name, and the layer and module that it decides for.

    `layer` is None when it serves several layers or stands outside of them; `module` is what its places share of their path.
    """

    name: str
    layer: int | None
    module: str


def routers_of(checkpoint: Checkpoint) -> tuple[RouterPlace, ...]:
    """The routers in the order of the slots; of a linear mixture, which has no gates, where they would stand."""
    if checkpoint.native is not None:
        module = checkpoint.native.family.mlp_module
        return tuple(RouterPlace(slot.name, layer, module) for layer, slot in enumerate(checkpoint.slots))
    places: Mapping[str, Any] = checkpoint.config["modekit"]["places"]
    found = []
    for slot in slots_of(checkpoint.config["modekit"]):
        leader = slot.name.removesuffix(".router.gate")
        served = [_in_layer(name) for name, entry in places.items() if entry["router"] == leader]
        layers = {layer for layer, _ in served}
        paths = [path for _, path in served]
        found.append(
            RouterPlace(slot.name, next(iter(layers)), _shared(paths)) if len(layers) == 1 else RouterPlace(slot.name, None, "")
        )
    return tuple(found)


def _in_layer(module: str) -> tuple[int | None, str]:
    """model.layers.3.mlp.up_proj -> (3, mlp.up_proj); lm_head -> (None, lm_head)."""
    if not module.startswith(_IN_LAYER):
        return None, module
    number, _, path = module.removeprefix(_IN_LAYER).partition(".")
    return int(number), path


def _shared(paths: Sequence[str]) -> str:
    """What dotted paths have in common at their beginning."""
    parts = [path.split(".") for path in paths]
    shared = []
    for place, part in enumerate(parts[0]):
        if any(len(other) <= place or other[place] != part for other in parts):
            break
        shared.append(part)
    return ".".join(shared)


@dataclass(frozen=True)
class Decisions:
    """What the routers made of a batch, float32 on the CPU. With one decision per output feature, the mean over features.

    Attributes:
        weights_RBSE: of the experts; they sum to one, less what an always-on base takes.
        chosen_RBSE: 1 where an expert has a weight above zero.
        entropy_RBS: of the weights, nats.
    """

    weights_RBSE: torch.Tensor
    chosen_RBSE: torch.Tensor
    entropy_RBS: torch.Tensor


def decisions(checkpoint: Checkpoint, trace: RouterTrace, shape: tuple[int, int]) -> Decisions:
    """What the routers decided in the traced pass over a batch of `shape` (B, S)."""
    weights, chosen, entropy = [], [], []
    for weight in _weights(checkpoint, trace, shape):
        every = weight[:, :, None] if weight.ndim == 3 else weight  # (B, S, O, E)
        relative = every / every.sum(-1, keepdim=True).clamp_min(_TINY)
        weights.append(every.mean(2).cpu())
        chosen.append((every > 0).float().mean(2).cpu())
        entropy.append(torch.special.entr(relative).sum(-1).mean(2).cpu())
    return Decisions(torch.stack(weights), torch.stack(chosen), torch.stack(entropy))


def _weights(checkpoint: Checkpoint, trace: RouterTrace, shape: tuple[int, int]) -> Iterator[torch.Tensor]:
    """Per router (B, S, E), or (B, S, O, E)."""
    recipe = checkpoint.record.recipe
    given = recipe.mixture.weights
    if checkpoint.native is None:
        routing = checkpoint.config["modekit"]["routing"]
        if routing["method"] == "linear":
            for _ in routers_of(checkpoint):
                yield torch.tensor(routing["weights"], dtype=torch.float32).expand(*shape, len(checkpoint.names))
            return
    else:
        routing = {"method": "routing", "top_k": int(checkpoint.config[checkpoint.native.top_k_key])}
    for slot, logits in zip(checkpoint.slots, trace, strict=True):
        features = (slot.features,) if slot.features else ()
        weights = select(logits.reshape(*shape, *features, len(checkpoint.names)), routing)
        if given is not None:  # folded into the experts, over which the gate is uniform
            weights = weights * torch.tensor([given[name] for name in checkpoint.names], device=weights.device)
            weights = weights / weights.sum(-1, keepdim=True)
        yield weights


def floats_per_token(checkpoint: Checkpoint) -> int:
    """What a traced pass keeps per token: of native routers all that they read, of the others their logits."""

    def kept(slot: RouterSlot) -> int:
        return slot.width if checkpoint.native is not None else max(slot.features, 1) * len(checkpoint.names)

    return max(1, sum(kept(slot) for slot in checkpoint.slots))
