"""Batches of next-token training: every sequence in turn, and with `by_length` little padding."""

from __future__ import annotations

from collections import Counter

from modekit.loaded.text_training import TextBatches, Training
from modekit.text.sequences import Batch, TokenSequence

LENGTHS = [4 + 7 * place % 60 for place in range(96)]
SEQUENCES = [TokenSequence((place, *[1] * (length - 1))) for place, length in enumerate(LENGTHS)]
TRAINING = Training(batch_tokens=256, sequence_length=64, seed=3)


def first_pass(training: Training) -> list[Batch]:
    batches = TextBatches(SEQUENCES, training)
    return [batches[step]["batch"] for step in range(len(batches))]


def test_every_sequence_comes_once_per_pass_in_a_drawn_order() -> None:
    for by_length in (False, True):
        taken = [int(row[0]) for batch in first_pass(TRAINING.with_(by_length=by_length)) for row in batch.input_ids]
        assert Counter(taken) == Counter(range(96))
        other = first_pass(TRAINING.with_(by_length=by_length, seed=4))
        assert taken != [int(row[0]) for batch in other for row in batch.input_ids]


def test_by_length_leaves_little_padding_and_no_order_of_lengths_between_steps() -> None:
    batches = first_pass(TRAINING.with_(by_length=True))
    padded, real = sum(batch.mask.numel() for batch in batches), sum(batch.tokens for batch in batches)
    drawn = sum(batch.mask.numel() for batch in first_pass(TRAINING))
    assert real / padded > 0.85 > real / drawn
    widths = [batch.mask.shape[1] for batch in batches]
    assert widths != sorted(widths) and widths != sorted(widths, reverse=True)


def test_a_pass_over_a_short_text_leaves_no_sequence_out() -> None:
    sequences = [TokenSequence((place, *[1] * 63)) for place in range(15)]
    batches = TextBatches(sequences, Training(batch_tokens=512, sequence_length=64))
    assert {int(row[0]) for step in range(len(batches)) for row in batches[step]["batch"].input_ids} == set(range(15))
