"""The weights that the routers of a checkpoint give: what the layers use, not logits.

Shape legend: B batch, S sequence (of a router in a decoder the target), D width, E experts, R routers, O output features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from modekit.architecture.modekit_router import select
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.loaded.passes import reads_target
from modekit.loaded.trace import RouterTrace
from modekit.text.sequences import Batch

_TINY = 1e-30


@dataclass(frozen=True)
class Decisions:
    """What some routers made of a batch, float32 on the CPU. With one decision per output feature, the mean over features; one
    decision for a whole source stands at each of its tokens.

    Attributes:
        routers: their places among all.
        of_target: whether they read the tokens of the targets; else those of plain text, or of the sources.
        weights_RBSE: of the experts; they sum to one, less what an always-on base takes.
        chosen_RBSE: 1 where an expert has a weight above zero.
        entropy_RBS: of the weights, nats.
    """

    routers: list[int]
    of_target: bool
    weights_RBSE: torch.Tensor
    chosen_RBSE: torch.Tensor
    entropy_RBS: torch.Tensor


def decisions(checkpoint: Checkpoint, trace: RouterTrace, batch: Batch) -> list[Decisions]:
    """What the routers decided in the traced pass over a batch: all together; over pairs first those that read the sources,
    then those that read the targets.
    """
    names = [router.name for router in checkpoint.shape.positions]
    of_target = [batch.target is not None and reads_target(name) for name in names]
    shapes = [(batch.target_mask if each else batch.mask).shape for each in of_target]
    weights = list(_weights(checkpoint, trace, shapes))
    stacks = {each: [place for place, own in enumerate(of_target) if own is each] for each in (False, True)}
    return [_of_stack(places, each, [weights[place] for place in places]) for each, places in stacks.items() if places]


def _of_stack(places: list[int], of_target: bool, stack: Sequence[torch.Tensor]) -> Decisions:
    weights, chosen, entropy = [], [], []
    for weight in stack:
        every = weight[:, :, None] if weight.ndim == 3 else weight  # (B, S, O, E)
        relative = every / every.sum(-1, keepdim=True).clamp_min(_TINY)
        weights.append(every.mean(2).cpu())
        chosen.append((every > 0).float().mean(2).cpu())
        entropy.append(torch.special.entr(relative).sum(-1).mean(2).cpu())
    return Decisions(places, of_target, torch.stack(weights), torch.stack(chosen), torch.stack(entropy))


def _weights(checkpoint: Checkpoint, trace: RouterTrace, shapes: Sequence[torch.Size]) -> Iterator[torch.Tensor]:
    """Per router (B, S, E), or (B, S, O, E); `shapes` are their (B, S)."""
    recipe = checkpoint.record.recipe
    given = recipe.mixture.weights
    routing = checkpoint.shape.routing
    if routing.method == "linear":
        for shape in shapes:
            yield torch.tensor(routing.weights, dtype=torch.float32).expand(*shape, len(checkpoint.names))
        return
    for slot, logits, shape in zip(checkpoint.slots, trace, shapes, strict=True):
        decided = (*((slot.features,) if slot.features else ()), len(checkpoint.names))
        if logits.numel() == shape[0] * math.prod(decided):  # one decision for all tokens of a text
            logits = logits.reshape(shape[0], 1, *decided).expand(*shape, *decided)
        weights = select(logits.reshape(*shape, *decided), routing.as_written())
        if given is not None:  # folded into the experts, over which the gate is uniform
            weights = weights * torch.tensor([given[name] for name in checkpoint.names], device=weights.device)
            weights = weights / weights.sum(-1, keepdim=True)
        yield weights
