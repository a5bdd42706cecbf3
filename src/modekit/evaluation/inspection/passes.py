"""Passes of a mixture over token sequences: the loss of every token, what the routers decided (the weights that the layers use,
not logits), and what each expert is worth.

Every sequence starts anew; pads take no part, and what is found is kept per sequence, so that neither padding nor the order
of batches changes a number beyond rounding.

Shape legend: B batch, S sequence (of a pair the source and behind it the target), E experts, R routers, P predicted tokens,
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
from modekit.evaluation.domains import Advance, not_finite, tokens_per_pass
from modekit.loaded.mixture import RouterTrace
from modekit.loaded.passes import losses_of, reads_target
from modekit.loaded.shapes import mixture_of
from modekit.planning.shape import RouterSlot
from modekit.sources.config import whole
from modekit.text.sequences import Batch, TokenSequence, make_batches

Array32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Decided:
    """What routers made of the tokens of one sequence. With one decision per output feature, the mean over features; one for a
    whole source stands at each of its tokens.

    Attributes:
        reads_RS: whether a router reads a token: all of a text, of a pair either its source or its target; else all is 0.
        weights_RSE: of the experts; they sum to one, less what an always-on base takes.
        chosen_RSE: 1 where an expert has a weight above zero.
        entropy_RS: of the weights, nats.
        inner_RSM: weights of each of an expert's own experts, where the base is a mixture itself; else M is 0.
    """

    reads_RS: npt.NDArray[np.bool_]
    weights_RSE: Array32
    chosen_RSE: Array32
    entropy_RS: Array32
    inner_RSM: Array32

    @property
    def mean_SE(self) -> Array32:
        """Weights, means over the routers that read a token."""
        mean_SE: Array32 = self.weights_RSE.sum(0) / self.reads_RS.sum(0)[:, None].clip(1)
        return mean_SE


Consume = Callable[[int, Decided], None]
"""Called with the place of a sequence, once."""

_TRACED = 2**26  # floats that a traced pass may keep
_TINY = 1e-30


def token_losses(model: PreTrainedModel, sequences: Sequence[TokenSequence], advance: Advance) -> list[Array32]:
    """Loss of every predicted token, nats, per sequence: (S - 1), 0 where a tag is not; or of a pair those of the target."""
    return _losses(model, sequences, tokens_per_pass(model.config), advance, lambda _batch: None)


def traced_losses(
    model: PreTrainedModel, checkpoint: Checkpoint, sequences: Sequence[TokenSequence], consume: Consume, advance: Advance
) -> list[Array32]:
    """As `token_losses`; what the routers decided goes to `consume`."""
    mixture = mixture_of(model, checkpoint)
    floats = sum(max(slot.width, slot.features * len(checkpoint.names)) for slot in _routers(checkpoint))
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


def loss_per_token(sequence: TokenSequence, losses_P: Array32) -> Array32:
    """Of all tokens of a sequence, (S); NaN for those that are not predicted."""
    found = np.full(sequence.size, np.nan, np.float32)
    found[sequence.size - sequence.places :] = losses_P
    found[list(sequence.silent)] = np.nan
    return found


def losses_without(
    model: PreTrainedModel, checkpoint: Checkpoint, sequences: Sequence[TokenSequence], advance: Advance
) -> list[list[Array32]]:
    """Losses as `token_losses` has them with each expert left out in turn; of a single expert there are no others, and none."""
    rows = []
    for expert in range(len(checkpoint.names)) if len(checkpoint.names) > 1 else ():
        with mixture_of(model, checkpoint).left_out(expert):
            rows.append(token_losses(model, sequences, advance))
    return rows


def decisions(
    checkpoint: Checkpoint, trace: RouterTrace, batch: Batch, sequences: Sequence[TokenSequence]
) -> Iterator[tuple[int, Decided]]:
    """What the routers decided in the traced pass over a batch of these sequences, with the place of each."""
    of_target = [batch.target is not None and reads_target(router.name) for router in checkpoint.shape.positions]
    shapes = [(batch.target_mask if each else batch.mask).shape for each in of_target]
    found = [_means(weights) for weights in router_weights(checkpoint, trace, shapes)]
    inner = [each.reshape(*shapes[0], -1) for each in trace.inner()]
    for at, row in enumerate(batch.rows):
        source, size = len(sequences[row].ids), sequences[row].size
        shape, experts = (len(found), size), len(checkpoint.names)
        reads = np.zeros(shape, np.bool_)
        within = np.stack([each[at, :size].numpy() for each in inner]) if inner else np.zeros((*shape, 0), np.float32)
        weights, chosen = (np.zeros((*shape, experts), np.float32) for _ in range(2))
        decided = Decided(reads, weights, chosen, np.zeros(shape, np.float32), within)
        for router, (target, arrays) in enumerate(zip(of_target, found, strict=True)):
            own = slice(source, size) if target else slice(0, source)
            reads[router, own] = True
            for filled, array in zip((decided.weights_RSE, decided.chosen_RSE, decided.entropy_RS), arrays, strict=True):
                filled[router, own] = array[at, : own.stop - own.start].numpy()
        yield row, decided


def _means(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, what is chosen (B, S, E) and entropies (B, S) of a router, means over the features, on the CPU."""
    every = weights[:, :, None] if weights.ndim == 3 else weights  # (B, S, O, E)
    entropy = torch.special.entr(every / every.sum(-1, keepdim=True).clamp_min(_TINY)).sum(-1)
    return every.mean(2).cpu(), (every > 0).float().mean(2).cpu(), entropy.mean(2).cpu()


def _routers(checkpoint: Checkpoint) -> Sequence[RouterSlot]:
    """Those that decide; of fine-tunes of a mixture these are their own, and no slot is set."""
    if checkpoint.slots:
        return checkpoint.slots
    hidden = whole(checkpoint.config, "hidden_size")
    return [RouterSlot(router.name, hidden, len(checkpoint.names)) for router in checkpoint.shape.positions]


def router_weights(checkpoint: Checkpoint, trace: RouterTrace, shapes: Sequence[torch.Size]) -> Iterator[torch.Tensor]:
    """What the layers used in the last pass, per router (B, S, E), or (B, S, O, E); `shapes` are their (B, S)."""
    given = checkpoint.record.recipe.mixture.weights
    routing = checkpoint.shape.routing
    if routing.method == "linear":
        for shape in shapes:
            yield torch.tensor(routing.weights, dtype=torch.float32).expand(*shape, len(checkpoint.names))
        return
    for slot, logits, shape in zip(_routers(checkpoint), trace, shapes, strict=True):
        decided = (*((slot.features,) if slot.features else ()), len(checkpoint.names))
        if logits.numel() == shape[0] * math.prod(decided):  # one decision for all tokens of a text
            logits = logits.reshape(shape[0], 1, *decided).expand(*shape, *decided)
        weights = select(logits.reshape(*shape, *decided), routing.as_written())
        if given is not None:  # folded into the experts, over which the gate is uniform
            weights = weights * torch.tensor([given[name] for name in checkpoint.names], device=weights.device)
            weights = weights / weights.sum(-1, keepdim=True)
        yield weights
