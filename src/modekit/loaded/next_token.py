"""Next-token training of some parameters of a model on the text of a domain, on one device; of a model with an encoder on
pairs, whose targets it learns to say.
"""

from __future__ import annotations

import dataclasses
import math
import platform
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modekit.errors import TextError
from modekit.loaded.load import default_device
from modekit.loaded.muon import Muon
from modekit.loaded.passes import check_text
from modekit.loaded.shares import NextTokenLoss, Shares
from modekit.loaded.train_state import NO_STATES, States, take_state
from modekit.run import DETAIL, QUIET, Run
from modekit.text.amounts import SAMPLE_TOKENS
from modekit.text.document import Document
from modekit.text.sequences import Batch, TokenSequence, encode, make_batches

_SORTED_TOGETHER = 8  # batches whose sequences are sorted: enough that little is padding, few enough that each is mixed


@dataclass(frozen=True)
class Training:
    """How long and how fast.

    Attributes:
        steps: optimiser steps; None passes once over the text.
        batch_tokens: tokens per step, pads included.
        sequence_length: longest piece of a document, or side of a pair, in tokens.
        learning_rate: peak of AdamW; linear warm-up over `warmup` of the steps, then linear to zero.
        muon_learning_rate: peak of Muon, used for the matrices of the decoder layers when above 0.
        weight_decay, warmup, clip: as usual.
        by_length: sequences of similar length share a step, and attention is not told which tokens are pads: on the right of
            a text they reach no real token of a causal model. A model with an encoder is always told.
        shares: threads that each take a share of a step's sequences, on a processor; of their number, not of that of the
            cores, the result depends.
        autocast: matrix products in bfloat16 where the processor has them; weights and sums stay in float32.
        max_tokens: text read at most.
        held_out_tokens: tokens on which the loss before and after is measured.
        seed: order of the sequences.
    """

    steps: int | None = None
    batch_tokens: int = 4_096
    sequence_length: int = 512
    learning_rate: float = 2e-5
    muon_learning_rate: float = 0.0
    weight_decay: float = 0.0
    warmup: float = 0.06
    clip: float = 1.0
    by_length: bool = False
    shares: int = 1
    autocast: bool = False
    max_tokens: int = 50_000_000
    held_out_tokens: int = SAMPLE_TOKENS
    seed: int = 0

    def with_(self, **changes: Any) -> Training:
        """The same settings with some changed."""
        return dataclasses.replace(self, **changes)


class Passes(Sequence[TokenSequence]):
    """Sequences that are read in another form in every pass."""

    @abstractmethod
    def of_pass(self, number: int, place: int) -> TokenSequence:
        """The one at a place as a pass reads it; passes are counted from 0."""


def training_sequences(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], training: Training
) -> list[TokenSequence]:
    """Sequences to train on; rests of a document shorter than a quarter of a sequence would mostly be padding."""
    return encode(
        tokenizer,
        documents,
        max_tokens=training.max_tokens,
        sequence_length=training.sequence_length,
        shortest_rest=training.sequence_length // 4,
    )


def train_language_model(
    model: PreTrainedModel,
    parameters: Sequence[torch.nn.Parameter],
    sequences: Sequence[TokenSequence],
    training: Training,
    *,
    states: States = NO_STATES,
    run: Run = QUIET,
) -> list[float]:
    """Next-token training on `sequences`; documents are never joined, pads never count. Returns the loss of each step.

    It goes on from the last of `states`, and ends as if it had never been killed. Raises TextError when the loss stops being
    finite, and where text is not of the kind that the model reads; TrainingError for a state that is damaged.
    """
    check_text(model, sequences)
    device = default_device()
    model.to(device).train()
    batches = _Batches(sequences, training)
    steps = training.steps or len(batches)
    bfloat16 = training.autocast and has_bfloat16_products(device)
    loss_of = NextTokenLoss(model, bfloat16=bfloat16, pads_named=not training.by_length)
    optimizers = _optimizers(model, parameters, training)
    losses = states.restore(parameters, optimizers)
    run.progress("train", len(losses), steps)
    with Shares(training.shares if device.type == "cpu" else 1) as shares:
        for step, batch in islice(zip(range(steps), batches.forever(), strict=False), len(losses), None):
            factor = _schedule(step, steps, training.warmup)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * factor
            loss = shares.gradients(loss_of, parameters, batch.to(device))
            if not math.isfinite(loss):
                raise TextError(
                    "the training loss is not finite", where=f"step {step}", found=loss, remedy="lower the learning rate"
                )
            torch.nn.utils.clip_grad_norm_(parameters, training.clip)
            shares.run(optimizer.step for optimizer in optimizers)
            for optimizer in optimizers:
                optimizer.zero_grad()
            losses.append(loss)
            if states.is_due:
                states.keep(take_state(parameters, optimizers, losses))
            run.progress(f"train{DETAIL}loss {loss:.3f}", step + 1, steps)
    model.eval()
    return losses


def has_bfloat16_products(device: torch.device) -> bool:
    """Whether bfloat16 products are faster than float32 ones here.

    Of processors without tile units, AMD's are twice as fast in bfloat16, Intel's half as fast, and others emulate it.
    """
    if device.type != "cpu":
        return True
    if torch.cpu._is_amx_tile_supported():
        return True
    return torch.cpu._is_avx512_bf16_supported() and not _is_intel()


def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "Intel" in platform.processor()


def _schedule(step: int, steps: int, warmup: float) -> float:
    warm = max(1, math.ceil(steps * warmup))
    return min((step + 1) / warm, max(0.02, 1.0 - max(0, step - warm) / max(1, steps - warm)))


def _optimizers(
    model: PreTrainedModel, parameters: Sequence[torch.nn.Parameter], training: Training
) -> list[torch.optim.Optimizer]:
    in_layers = {id(parameter) for name, parameter in model.named_parameters() if ".layers." in name and parameter.ndim == 2}
    matrices = [p for p in parameters if training.muon_learning_rate > 0 and id(p) in in_layers]
    others = [p for p in parameters if not (training.muon_learning_rate > 0 and id(p) in in_layers)]
    optimizers: list[torch.optim.Optimizer] = []
    for share in (matrices[place :: training.shares] for place in range(training.shares)):
        if share:
            products = torch.bfloat16 if has_bfloat16_products(share[0].device) else torch.float32
            optimizers.append(
                Muon(share, lr=training.muon_learning_rate, weight_decay=training.weight_decay, products=products)
            )
    if others:
        optimizers.append(
            torch.optim.AdamW(others, lr=training.learning_rate, betas=(0.9, 0.95), weight_decay=training.weight_decay)
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


class _Batches:
    """Padded batches in a seeded order that is drawn anew for every pass."""

    def __init__(self, sequences: Sequence[TokenSequence], training: Training) -> None:
        self._sequences = sequences
        longest = (max(len(s.ids) for s in sequences), max(len(s.target) for s in sequences))
        self.rows: int = max(1, training.batch_tokens // sum(min(training.sequence_length, each) for each in longest))
        self._sorted = _SORTED_TOGETHER if training.by_length else 1
        self._generator = torch.Generator().manual_seed(training.seed)
        self._begun = 0  # sequences of all passes that are begun: rows are counted on from pass to pass

    def __len__(self) -> int:
        return max(1, len(self._sequences) // self.rows)

    def forever(self) -> Iterable[Batch]:
        """Without end."""
        pending: list[int] = []
        drawn = self.rows * self._sorted
        while True:
            while len(pending) < drawn:
                pending += [self._begun + row for row in self._permutation(len(self._sequences))]
                self._begun += len(self._sequences)
            rows, pending = pending[:drawn], pending[drawn:]
            yield from self._batches(rows)

    def _batches(self, rows: list[int]) -> Iterable[Batch]:
        """The rows as batches; of several batches each takes sequences of similar length, in a drawn order."""
        starts = list(range(0, len(rows), self.rows))
        if len(starts) > 1:
            rows = sorted(rows, key=lambda row: self._sequences[row % len(self._sequences)].size)
            starts = [starts[place] for place in self._permutation(len(starts))]
        for start in starts:
            yield from make_batches([self._read(row) for row in rows[start : start + self.rows]], tokens=2**31)

    def _read(self, row: int) -> TokenSequence:
        number, place = divmod(row, len(self._sequences))
        return self._sequences.of_pass(number, place) if isinstance(self._sequences, Passes) else self._sequences[place]

    def _permutation(self, count: int) -> list[int]:
        return torch.randperm(count, generator=self._generator).tolist()
