"""Passes of a mixture over token sequences: the loss of every token, what the routers decided (the weights that the layers use,
not logits), and what each expert is worth.

Every sequence starts anew; pads take no part, and what is found is kept per sequence, so that neither padding nor the order
of batches changes a number beyond rounding.

Shape legend: B batch, S sequence (of a router in a decoder the target), E experts, R routers, N sequences, P predicted tokens,
O output features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from modekit.architecture.modekit_router import select
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.evaluation.loss import not_finite, tokens_per_pass
from modekit.loaded.mixture import RouterTrace
from modekit.loaded.passes import losses_of, reads_target
from modekit.loaded.shapes import mixture_of
from modekit.text.sequences import Batch, TokenSequence, make_batches

Array32 = npt.NDArray[np.float32]
Array64 = npt.NDArray[np.float64]

Advance = Callable[[int], object]
"""Called with the tokens of each batch once they are done."""


@dataclass(frozen=True)
class Decided:
    """What routers made of the real tokens of one sequence: of all of them, or of a pair those that read its source, or target.
    With one decision per output feature, the mean over features; one for a whole source stands at each of its tokens.

    Attributes:
        routers: their places among all.
        of_target: whether the tokens are those of a pair's target.
        weights_RSE: of the experts; they sum to one, less what an always-on base takes.
        chosen_RSE: 1 where an expert has a weight above zero.
        entropy_RS: of the weights, nats.
    """

    routers: list[int]
    of_target: bool
    weights_RSE: Array32
    chosen_RSE: Array32
    entropy_RS: Array32


Consume = Callable[[int, Decided], None]
"""Called with the place of a sequence, once; for a pair once for each side that routers read."""

_TRACED = 2**26  # floats that a traced pass may keep


def token_losses(model: PreTrainedModel, sequences: Sequence[TokenSequence], advance: Advance) -> list[Array32]:
    """Loss of every predicted token, nats, per sequence: (S - 1), 0 where a tag is not; or of a pair (T)."""
    return _losses(model, sequences, tokens_per_pass(model.config), advance, lambda _batch: None)


def traced_losses(
    model: PreTrainedModel, checkpoint: Checkpoint, sequences: Sequence[TokenSequence], consume: Consume, advance: Advance
) -> list[Array32]:
    """As `token_losses`; what the routers decided goes to `consume`."""
    mixture = mixture_of(model, checkpoint)
    floats = sum(max(slot.width, slot.features * len(checkpoint.names)) for slot in checkpoint.slots)
    tokens = min(tokens_per_pass(model.config), max(512, _TRACED // max(1, floats)))
    with mixture.traced() as trace:

        def give(batch: Batch) -> None:
            for row, decided in decisions(checkpoint, trace, batch, sequences):
                consume(row, decided)

        return _losses(model, sequences, tokens, advance, give)


@torch.inference_mode()
def _losses(
    model: PreTrainedModel, sequences: Sequence[TokenSequence], tokens: int, advance: Advance, passed: Callable[[Batch], None]
) -> list[Array32]:
    """`passed` gets every batch, as soon as the model has read it. Raises CheckpointError for a loss that is not finite."""
    losses: list[Array32] = [np.zeros(0, np.float32)] * len(sequences)
    for batch in make_batches(sequences, tokens=tokens):
        losses_BP = losses_of(model, batch).cpu()
        for place, row in enumerate(batch.rows):
            losses[row] = losses_BP[place, : sequences[row].places].numpy()
        if not torch.isfinite(losses_BP).all():
            raise not_finite("losses are", str(model.config.name_or_path))
        passed(batch)
        advance(batch.tokens)
    return losses


def loss_per_token(sequence: TokenSequence, losses_P: Array32) -> list[float | None]:
    """Of all tokens of a sequence, of a pair the source's first; None for those that are not predicted."""
    found: list[float | None] = [*[None] * (sequence.size - sequence.places), *losses_P.tolist()]
    if sequence.silent is not None:
        found[sequence.silent] = None
    return found


def sums_of(losses: Sequence[Array32]) -> Array64:
    """Loss of each sequence, (N), nats: the sum over its tokens."""
    return np.array([each.sum(dtype=np.float64) for each in losses])


def changes_without(
    model: PreTrainedModel, checkpoint: Checkpoint, sequences: Sequence[TokenSequence], whole_N: Array64, advance: Advance
) -> Array64:
    """What leaving out each expert adds to the loss of each sequence, (E, N), nats over all its tokens.

    One pass per expert; of a single expert there are no others, and E is 0.
    """
    rows = []
    for expert in range(len(checkpoint.names)) if len(checkpoint.names) > 1 else ():
        with mixture_of(model, checkpoint).left_out(expert):
            rows.append(sums_of(token_losses(model, sequences, advance)) - whole_N)
    return np.array(rows).reshape(len(rows), len(sequences))


@dataclass
class Traced:
    """What is known of one sequence: weights of the routers, or their mean as one; mean entropy of its tokens; losses of its
    predicted tokens; what leaving out each expert adds to their sum. Where a router does not read, weights are 0.
    """

    weights_RSE: Array32
    entropy_S: Array64
    losses_P: Array32
    changes_E: Array64


def trace(
    model: PreTrainedModel, checkpoint: Checkpoint, sequences: Sequence[TokenSequence], advance: Advance, *, every: bool = True
) -> list[Traced]:
    """Each sequence with the weights of `every` router, or with their mean."""
    routers, experts = len(checkpoint.shape.positions) if every else 1, len(checkpoint.names)
    weights = [np.zeros((routers, sequence.size, experts), np.float32) for sequence in sequences]
    entropies = [np.zeros(sequence.size) for sequence in sequences]

    def consume(row: int, decided: Decided) -> None:
        start = len(sequences[row].ids) if decided.of_target else 0
        at = slice(start, start + decided.weights_RSE.shape[1])
        if every:
            weights[row][decided.routers, at] = decided.weights_RSE
        else:
            weights[row][0, at] = decided.weights_RSE.mean(0)
        entropies[row][at] = decided.entropy_RS.mean(0)

    losses = traced_losses(model, checkpoint, sequences, consume, advance)
    changes_EN = changes_without(model, checkpoint, sequences, sums_of(losses), advance)
    return [Traced(*each) for each in zip(weights, entropies, losses, changes_EN.T, strict=True)]


_TINY = 1e-30


def decisions(
    checkpoint: Checkpoint, trace: RouterTrace, batch: Batch, sequences: Sequence[TokenSequence]
) -> Iterator[tuple[int, Decided]]:
    """What the routers decided in the traced pass over a batch of these sequences, with the place of each: all together;
    over pairs first those that read its source, then those that read its target.
    """
    names = [router.name for router in checkpoint.shape.positions]
    of_target = [batch.target is not None and reads_target(name) for name in names]
    shapes = [(batch.target_mask if each else batch.mask).shape for each in of_target]
    weights = list(router_weights(checkpoint, trace, shapes))
    stacks = [(each, [place for place, own in enumerate(of_target) if own is each]) for each in (False, True)]
    parts = [(each, places, _stacked([weights[place] for place in places])) for each, places in stacks if places]
    for at, row in enumerate(batch.rows):
        for each, places, arrays in parts:
            length = len(sequences[row].target if each else sequences[row].ids)
            yield row, Decided(places, each, *(array[:, at, :length].numpy() for array in arrays))


def _stacked(stack: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Weights, what is chosen (R, B, S, E) and entropies (R, B, S), means over the features, on the CPU."""
    found = []
    for weight in stack:
        every = weight[:, :, None] if weight.ndim == 3 else weight  # (B, S, O, E)
        entropy = torch.special.entr(every / every.sum(-1, keepdim=True).clamp_min(_TINY)).sum(-1)
        found.append([each.mean(2).cpu() for each in (every, (every > 0).float(), entropy)])
    return [torch.stack(each) for each in zip(*found, strict=True)]


def router_weights(checkpoint: Checkpoint, trace: RouterTrace, shapes: Sequence[torch.Size]) -> Iterator[torch.Tensor]:
    """What the layers used in the last pass, per router (B, S, E), or (B, S, O, E); `shapes` are their (B, S)."""
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
