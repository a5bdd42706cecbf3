"""The weights that the routers of a checkpoint give: what the layers use, not logits.

Shape legend: B batch, S sequence, D width, E experts, R routers, O output features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from modekit.architecture.modekit_router import select
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.loaded.trace import RouterTrace

_TINY = 1e-30


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
    routing = checkpoint.shape.routing
    if routing.method == "linear":
        for _ in checkpoint.shape.positions:
            yield torch.tensor(routing.weights, dtype=torch.float32).expand(*shape, len(checkpoint.names))
        return
    for slot, logits in zip(checkpoint.slots, trace, strict=True):
        features = (slot.features,) if slot.features else ()
        weights = select(logits.reshape(*shape, *features, len(checkpoint.names)), routing.as_written())
        if given is not None:  # folded into the experts, over which the gate is uniform
            weights = weights * torch.tensor([given[name] for name in checkpoint.names], device=weights.device)
            weights = weights / weights.sum(-1, keepdim=True)
        yield weights
