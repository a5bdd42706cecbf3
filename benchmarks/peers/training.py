"""The one training loop of peers that train: AdamW, a rate that falls as a cosine, domains in turns.

Shape legend: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from peers.peer import Pool
from peers.pool import read_text


@dataclass(frozen=True)
class Steps:
    """How long: each step has a row of `length` tokens of every domain."""

    count: int
    rate: float
    length: int = 256

    @property
    def said(self) -> str:
        """For a note."""
        return f"{self.count} steps of {self.length} tokens of each domain, rate {self.rate:g}"


STEPS = Steps(count=60, rate=1e-3)
"""Of every way that trains: 61,000 tokens, a third of what one expert was made from. BTX's paper takes 80 billion."""


def batches(pool: Pool, steps: Steps) -> Iterator[torch.Tensor]:
    """Token ids (B, S): a row per domain, cut out of its fit text as one string of documents."""
    tokenizer, draw = AutoTokenizer.from_pretrained(pool.base), random.Random(pool.seed)
    strings = []
    for path in pool.text.values():
        documents = read_text(path)
        draw.shuffle(documents)
        strings.append([token for each in documents for token in tokenizer(each)["input_ids"]])
    for _ in range(steps.count):
        starts = [draw.randrange(len(each) - steps.length) for each in strings]
        yield torch.tensor([each[start : start + steps.length] for each, start in zip(strings, starts, strict=True)])


def train(
    pool: Pool,
    logits: Callable[[torch.Tensor], torch.Tensor],
    moving: Sequence[torch.nn.Parameter],
    steps: Steps,
) -> list[float]:
    """Train `moving` on the next token; returns the losses."""
    optimizer, found = torch.optim.AdamW(moving, steps.rate), list[float]()
    for step, ids_BS in enumerate(batches(pool, steps)):
        for group in optimizer.param_groups:
            group["lr"] = steps.rate * 0.5 * (1 + math.cos(math.pi * step / steps.count))
        loss = cross_entropy(logits(ids_BS)[:, :-1].flatten(0, 1), ids_BS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(moving, 1.0)
        optimizer.step()
        found.append(float(loss.detach()))
    return found
