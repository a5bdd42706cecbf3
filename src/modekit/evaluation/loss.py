"""Loss of a model on held-out text: of every next token, or of pairs of every token of the targets. No figure comes from a
model whose output is not finite.

Shape legend: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from modekit.errors import CheckpointError
from modekit.evaluation.domains import Domain
from modekit.evaluation.results import Score, in_blocks
from modekit.loaded.passes import check_text, losses_of, tokens_per_batch
from modekit.text.sequences import make_batches

Advance = Callable[[int], object]
"""Called with how many tokens more are done."""


def tokens_per_pass(config: PreTrainedConfig) -> int:
    """Padded tokens of a batch whose logits, (B, S, V) float32, stay within bounds."""
    return max(512, min(8_192, 2**26 // int(config.vocab_size)))


def score_domain(model: PreTrainedModel, domain: Domain, advance: Advance) -> Score:
    """Mean loss of a model on a domain's tokens; every sequence starts anew, pads are not scored.

    Raises TextError for text of another kind than the model reads.
    """
    check_text(model, domain.sequences, where=domain.name or None)
    tokens = min(tokens_per_pass(model.config), tokens_per_batch(model))
    sums = torch.zeros(len(domain.sequences), dtype=torch.float64)
    with torch.inference_mode():
        for batch in make_batches(domain.sequences, tokens=tokens):
            sums[list(batch.rows)] = losses_of(model, batch).double().sum(1).cpu()
            advance(batch.scored)
    blocks = in_blocks(sums.tolist()) if len(sums) > 1 else ()
    return Score(float(sums.sum()) / domain.scored_tokens, blocks=blocks)


def not_finite(what: str, where: str) -> CheckpointError:
    """The error of a model that gives NaN or Inf."""
    return CheckpointError(f"{what} not finite", where=where, remedy="look for what is damaged with `modekit verify`")


@contextmanager
def only_finite(model: PreTrainedModel) -> Iterator[None]:
    """While open, a pass whose logits are not finite raises CheckpointError."""

    def check(_: object, _inputs: object, output: Any) -> None:
        if not torch.isfinite(output.logits).all():
            raise not_finite("what the model says is", str(model.config.name_or_path))

    hook = model.register_forward_hook(check)
    try:
        yield
    finally:
        hook.remove()
