"""Passes of a mixture over token sequences: the loss of every token, what the routers decided, and what each expert is worth.

Every sequence starts anew; pads take no part, and what is found is kept per sequence, so that neither padding nor the order
of batches changes a number beyond rounding.

Shape legend: B batch, S sequence, E experts, R routers, N sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.evaluation.inspection.routers import decisions
from modekit.evaluation.loss import tokens_per_pass
from modekit.loaded.shapes import mixture_of
from modekit.text.sequences import Batch, TokenSequence, make_batches

Array32 = npt.NDArray[np.float32]
Array64 = npt.NDArray[np.float64]

Advance = Callable[[int], object]
"""Called with the tokens of each batch once they are done."""

Consume = Callable[[int, Array32, Array32, Array32], None]
"""(place of the sequence, weights (R, S, E), chosen (R, S, E), entropy (R, S)) of its real tokens; see routers.Decisions."""

_TRACED = 2**26  # floats that a traced pass may keep


def token_losses(model: PreTrainedModel, sequences: Sequence[TokenSequence], advance: Advance) -> list[Array32]:
    """Loss of every token but the first, (S - 1), nats, per sequence."""
    losses: list[Array32] = [np.zeros(0, np.float32)] * len(sequences)
    for batch, losses_BS in _passes(model, sequences, tokens_per_pass(model.config), advance):
        for place, row in enumerate(batch.rows):
            losses[row] = losses_BS[place, : len(sequences[row].ids) - 1].numpy()
    return losses


def traced_losses(
    model: PreTrainedModel, checkpoint: Checkpoint, sequences: Sequence[TokenSequence], consume: Consume, advance: Advance
) -> list[Array32]:
    """As `token_losses`; what the routers decided goes to `consume`."""
    losses: list[Array32] = [np.zeros(0, np.float32)] * len(sequences)
    mixture = mixture_of(model, checkpoint)
    tokens = min(tokens_per_pass(model.config), max(512, _TRACED // mixture.floats_per_token()))
    with mixture.traced() as trace:
        for batch, losses_BS in _passes(model, sequences, tokens, advance):
            made = decisions(checkpoint, trace, (batch.input_ids.shape[0], batch.input_ids.shape[1]))
            for place, row in enumerate(batch.rows):
                length = len(sequences[row].ids)
                losses[row] = losses_BS[place, : length - 1].numpy()
                consume(
                    row, made.weights_RBSE[:, place, :length].numpy(), made.chosen_RBSE[:, place, :length].numpy(),
                    made.entropy_RBS[:, place, :length].numpy(),
                )  # fmt: skip
    return losses


def _passes(
    model: PreTrainedModel, sequences: Sequence[TokenSequence], tokens: int, advance: Advance
) -> Iterator[tuple[Batch, torch.Tensor]]:
    """Each batch with the loss of its tokens but the first, (B, S - 1) float32 on the CPU; behind the end they mean nothing."""
    with torch.inference_mode():
        for batch in make_batches(sequences, tokens=tokens):
            input_ids, mask = batch.input_ids.to(model.device), batch.mask.to(model.device)
            logits = model(input_ids=input_ids, attention_mask=mask.long(), use_cache=False).logits[:, :-1].float()
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none")
            yield batch, losses.view(len(batch.rows), -1).cpu()
            advance(int(batch.mask.sum()))


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
