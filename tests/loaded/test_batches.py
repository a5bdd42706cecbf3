"""Batches of next-token training: every sequence in turn, and with `by_length` little padding."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import torch

from modekit.loaded.next_token import Training, _Batches
from modekit.text.sequences import TokenSequence

LENGTHS = [4 + 7 * place % 60 for place in range(96)]
SEQUENCES = [TokenSequence((place, *[1] * (length - 1)), 0) for place, length in enumerate(LENGTHS)]
TRAINING = Training(batch_tokens=256, sequence_length=64, seed=3)


def first_pass(training: Training) -> list[tuple[torch.Tensor, torch.Tensor]]:
    batches = _Batches(SEQUENCES, training)
    return list(islice(batches.forever(), len(batches)))


def test_every_sequence_comes_once_per_pass_in_a_drawn_order() -> None:
    for by_length in (False, True):
        taken = [int(row[0]) for input_ids, _ in first_pass(TRAINING.with_(by_length=by_length)) for row in input_ids]
        assert Counter(taken) == Counter(range(96))
        other = first_pass(TRAINING.with_(by_length=by_length, seed=4))
        assert taken != [int(row[0]) for input_ids, _ in other for row in input_ids]


def test_by_length_leaves_little_padding_and_no_order_of_lengths_between_steps() -> None:
    batches = first_pass(TRAINING.with_(by_length=True))
    padded, real = sum(mask.numel() for _, mask in batches), sum(int(mask.sum()) for _, mask in batches)
    drawn = sum(mask.numel() for _, mask in first_pass(TRAINING))
    assert real / padded > 0.85 > real / drawn
    widths = [mask.shape[1] for _, mask in batches]
    assert widths != sorted(widths) and widths != sorted(widths, reverse=True)
