"""Training of some parameters of a model on text, by the engine (engine.py): what a text's next tokens are worth; of a model
with an encoder pairs, whose targets it learns to say.

Shape legend: B batch, S sequence, T target of a pair, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modekit.errors import TrainingError
from modekit.loaded.engine import Loop, LoopSettings, TrainedModule
from modekit.loaded.passes import check_text, inputs_of, losses_by_label
from modekit.run import QUIET, Run
from modekit.text.amounts import SAMPLE_TOKENS
from modekit.text.document import Document
from modekit.text.sequences import Batch, TokenSequence, encode, make_batches

_SORTED_TOGETHER = 8  # batches whose sequences are sorted: enough that little is padding, few enough that each is mixed
_LEAST_RATE = 0.02  # of its peak


@dataclass(frozen=True)
class Training:
    """How long and how fast.

    Attributes:
        steps: optimiser steps; None passes once over the text.
        batch_tokens: tokens per step; with pads at most twice as many.
        sequence_length: longest piece of a document, or side of a pair, in tokens.
        learning_rate: peak of AdamW; linear warm-up over `warmup` of the steps, then linear to zero.
        by_length: sequences of similar length share a step, and attention is not told which tokens are pads: on the right of
            a text they reach no real token of a causal model. A model with an encoder is always told.
        autocast: matrix products in bfloat16 where the processor has them; weights and sums stay in float32.
        max_tokens: text read at most.
        held_out_tokens: tokens on which the loss before and after is measured.
        seed: order of the sequences, and what is drawn in a pass.
    """

    steps: int | None = None
    batch_tokens: int = 4_096
    sequence_length: int = 512
    learning_rate: float = 2e-5
    weight_decay: float = 0.0
    warmup: float = 0.06
    clip: float = 1.0
    by_length: bool = False
    autocast: bool = False
    max_tokens: int = 50_000_000
    held_out_tokens: int = SAMPLE_TOKENS
    seed: int = 0

    def with_(self, **changes: Any) -> Training:
        """The same settings with some changed."""
        return dataclasses.replace(self, **changes)


ReadInPass = Callable[[int, int], TokenSequence]
"""The sequence at a place as a pass reads it; passes are counted from 0."""


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
        answers=True,
    )


def train_on_text(
    model: PreTrainedModel,
    sequences: Sequence[TokenSequence],
    training: Training,
    *,
    read: ReadInPass | None = None,
    folder: Path | None = None,
    run: Run = QUIET,
) -> list[float]:
    """Train what of a model has gradients on `sequences`; documents are never joined, pads never count. The loss of each step.

    `read`: how sequences are read, where that is another in every pass.

    It goes on from the last state in `folder`, and ends as if it had never been killed. Raises TextError where text is not of
    the kind that the model reads, TrainingError when the loss stops being finite, and for a state that is damaged.
    """
    check_text(model, sequences)
    batches = TextBatches(sequences, training, read)
    bfloat16 = training.autocast and has_bfloat16_products(model.device)
    loop = LoopSettings(len(batches), 1, training.warmup, training.clip, training.seed, bfloat16, _LEAST_RATE)
    going = Loop(TextLoss(model, training), batches, loop, folder, run)
    going.go()
    model.eval()
    return [entry["loss"] for entry in going.history]


class TextLoss(TrainedModule):
    """`model` with the cross-entropy of a batch's next tokens, or of its targets, in nats.

    Pads are not predicted. Unless `by_length`, attention is told which tokens are pads; encoders, which read to the right, too,
    always are.
    """

    def __init__(self, model: PreTrainedModel, training: Training) -> None:
        super().__init__(model)
        self._training = training

    def forward(self, batch: Batch) -> torch.Tensor:
        """The mean over all predicted tokens."""
        inputs = inputs_of(self.model, batch)
        if batch.target is None and self._training.by_length:
            del inputs["attention_mask"]
        losses = losses_by_label(self.model, inputs, batch.labels)
        if self.training and not losses.requires_grad:
            raise TrainingError(
                "no gradient reaches what is to be trained",
                where=self.config.model_type,
                remedy="train all parameters (--train full)",
            )
        return losses.sum() / batch.scored

    def groups(self) -> list[dict[str, Any]]:
        """One for all."""
        training = self._training
        moving = [each for each in self.model.parameters() if each.requires_grad]
        return [{"params": moving, "lr": training.learning_rate, "weight_decay": training.weight_decay}]


def has_bfloat16_products(device: torch.device) -> bool:
    """Whether bfloat16 products are faster than float32 ones here.

    Of processors without tile units, AMD's are twice as fast in bfloat16, Intel's half as fast, and others emulate it.
    """
    if device.type != "cpu" or torch.cpu._is_amx_tile_supported():
        return True
    return torch.cpu._is_avx512_bf16_supported() and not _is_intel()


def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "Intel" in platform.processor()


class TextBatches(torch.utils.data.Dataset[dict[str, Batch]]):
    """One padded batch per step, in a seeded order that is drawn anew for every pass."""

    def __init__(self, sequences: Sequence[TokenSequence], training: Training, read: ReadInPass | None = None) -> None:
        self._sequences = sequences
        self._read = read or (lambda _, place: sequences[place])
        self._tokens = training.batch_tokens
        self._generator = torch.Generator().manual_seed(training.seed)
        passes = count(step=len(sequences)) if training.steps else [0]
        together = _SORTED_TOGETHER if training.by_length else 1
        self._steps = list(islice(self._planned(passes, together), training.steps))

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, step: int) -> dict[str, Batch]:
        (batch,) = make_batches([self._read(*divmod(row, len(self._sequences))) for row in self._steps[step]], tokens=2**31)
        return {"batch": batch}

    def describe(self, number: int) -> str:
        """How much a step reads."""
        return f"{len(self._steps[number])} sequences"

    def _planned(self, passes: Iterable[int], sorted_together: int) -> Iterator[list[int]]:
        """Rows of every step, counted on from pass to pass, `passes` being the first row of each; of several steps that are
        drawn together each takes sequences of similar length, in a drawn order.
        """
        drawn = self._filled(begun + row for begun in passes for row in self._permutation(len(self._sequences)))
        while steps := list(islice(drawn, sorted_together)):
            if sorted_together > 1:
                steps = list(self._filled(sorted(chain(*steps), key=self._size)))
                steps = [steps[place] for place in self._permutation(len(steps))]
            yield from steps

    def _filled(self, rows: Iterable[int]) -> Iterator[list[int]]:
        """Rows in their order, as many in a step as have `batch_tokens`, and twice as many with pads, or one that has more."""
        step, tokens, longest = list[int](), 0, 0
        for row in rows:
            size = self._size(row)
            tokens, longest = tokens + size, max(longest, size)
            if step and (tokens > self._tokens or longest * (len(step) + 1) > 2 * self._tokens):
                yield step
                step, tokens, longest = [], size, size
            step.append(row)
        if step:
            yield step

    def _size(self, row: int) -> int:
        return self._sequences[row % len(self._sequences)].size

    def _permutation(self, count: int) -> list[int]:
        return torch.randperm(count, generator=self._generator).tolist()
