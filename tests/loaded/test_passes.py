"""Models with an encoder over pairs: every family's own loss, whatever stands beside a pair in its batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from conftest import tiny_model
from modekit.errors import TextError
from modekit.evaluation.domains import Domain, score_domain
from modekit.evaluation.inspection.passes import token_losses
from modekit.loaded.passes import inputs_of, losses_of
from modekit.loaded.text_training import TextBatches, Training, train_on_text
from modekit.text.sequences import Batch, TokenSequence, encode, make_batches
from pair_models import PAIR_FAMILIES, pair_model, pair_tokenizer, pairs


@pytest.fixture(scope="module")
def sequences() -> list[TokenSequence]:
    found = encode(pair_tokenizer(), pairs(12), max_tokens=10_000, sequence_length=64)
    assert len(found) == 12 and len({len(each.ids) for each in found}) > 3
    return found


def own_losses(model: PreTrainedModel, sequences: Sequence[TokenSequence]) -> list[float]:
    """What the model itself says of each pair alone, per token of its target."""
    with torch.inference_mode():
        return [float(model(input_ids=torch.tensor([each.ids]), labels=torch.tensor([each.target])).loss) for each in sequences]


@pytest.mark.parametrize("family", PAIR_FAMILIES)
def test_the_loss_is_the_model_s_own(family: str, sequences: list[TokenSequence]) -> None:
    model = pair_model(family)
    own, tokens = own_losses(model, sequences), [each.scored for each in sequences]
    found = token_losses(model, sequences, lambda _: None)
    assert [len(each) for each in found] == tokens
    np.testing.assert_allclose([each.mean() for each in found], own, rtol=1e-5)
    score = score_domain(model, Domain("d", 0, sequences), lambda _: None)
    assert score.loss == pytest.approx(np.average(own, weights=tokens), rel=1e-5)


@pytest.mark.parametrize("family", PAIR_FAMILIES)
def test_padding_changes_nothing(family: str, sequences: list[TokenSequence]) -> None:
    model = pair_model(family)
    alone = {row: losses_of(model, batch)[0] for batch in make_batches(sequences, tokens=1) for row in batch.rows}
    for batch in make_batches(sequences):
        batch.input_ids.masked_fill_(~batch.mask, 9)
        losses = losses_of(model, batch)
        for place, row in enumerate(batch.rows):
            length = sequences[row].scored
            torch.testing.assert_close(losses[place, :length], alone[row], atol=1e-5, rtol=1e-5)
            assert not losses[place, length:].any()


@pytest.mark.parametrize("family", PAIR_FAMILIES)
def test_the_decoder_reads_what_stands_before_each_label(family: str) -> None:
    (batch,) = make_batches([TokenSequence((5, 2), target=(6, 7, 2)), TokenSequence((5, 8, 2), target=(9, 2))])
    model = pair_model(family)
    inputs = inputs_of(model, batch)
    start = 2 if family in ("bart", "mbart", "m2m_100") else 0  # mBART's is the last label
    by_row = dict(zip(batch.rows, inputs["decoder_input_ids"].tolist(), strict=True))
    assert by_row[0] == [start, 6, 7] and by_row[1][:2] == [start, 9]
    assert torch.equal(inputs["decoder_attention_mask"].bool(), batch.target_mask)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_training_learns_pairs(family: str, sequences: list[TokenSequence]) -> None:
    model = pair_model(family).train()
    before = np.mean(own_losses(model, sequences))
    training = Training(steps=40, batch_tokens=200, sequence_length=64, learning_rate=3e-3, by_length=True)
    found = train_on_text(model, sequences, training)
    assert sum(found[-5:]) < 0.8 * sum(found[:5])
    assert np.mean(own_losses(model, sequences)) < 0.8 * before


def test_text_of_another_kind_is_refused_before_any_pass(sequences: list[TokenSequence]) -> None:
    plain = [TokenSequence((5, 6, 7))]
    for model, text, what in (
        (pair_model("bart"), plain, "needs pairs"),
        (tiny_model(), sequences, "reads plain text"),
    ):
        with pytest.raises(TextError, match=what):
            score_domain(model, Domain("d", 0, text), lambda _: None)
        with pytest.raises(TextError, match=what):
            train_on_text(model, text, Training(steps=1))
        with pytest.raises(TextError, match=what):
            next(iter(inputs_of(model, batch) for batch in make_batches(text)))


@pytest.mark.parametrize("family", ["gpt2", "gptj"])
def test_a_text_beyond_the_model_s_positions_is_refused_in_a_sentence(family: str) -> None:
    fits, longer = (Domain("d", 0, [TokenSequence((5,) * length)]) for length in (32, 33))
    model = tiny_model(family, max_position_embeddings=32, **({"rotary_dim": 8} if family == "gptj" else {}))
    assert score_domain(model, fits, lambda _: None)
    with pytest.raises(TextError, match="a text has more tokens than the model has positions") as error:
        score_domain(model, longer, lambda _: None)
    assert "ask for a sequence_length of 32" in str(error.value)
    assert score_domain(tiny_model(max_position_embeddings=32), longer, lambda _: None)  # rotary ones go on


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
    assert real / padded > 0.8 > real / drawn
    widths = [batch.mask.shape[1] for batch in batches]
    assert widths != sorted(widths) and widths != sorted(widths, reverse=True)


def test_a_pass_over_a_short_text_leaves_no_sequence_out() -> None:
    sequences = [TokenSequence((place, *[1] * 63)) for place in range(15)]
    batches = TextBatches(sequences, Training(batch_tokens=512, sequence_length=64))
    assert {int(row[0]) for step in range(len(batches)) for row in batches[step]["batch"].input_ids} == set(range(15))


@pytest.mark.parametrize("by_length", [False, True])
def test_a_step_reads_as_many_real_tokens_as_asked_and_few_pads(by_length: bool) -> None:
    batches = first_pass(TRAINING.with_(by_length=by_length))
    assert all(batch.tokens <= 256 and batch.mask.numel() <= 512 for batch in batches)
    assert sum(batch.tokens for batch in batches) / len(batches) > 0.7 * 256
