"""A batch in shares: the gradients of the whole, the same every time, and torch's threads given back."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from conftest import tiny_model
from modekit.loaded.text_training import TextLoss, Training
from modekit.loaded.threads import Threads
from modekit.text.sequences import Batch


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model().train()


def batch(rows: int) -> Batch:
    """Rows of falling length, padded on the right."""
    ids = torch.randint(3, 30, (rows, 12), generator=torch.Generator().manual_seed(rows))
    mask = torch.arange(12)[None] < torch.tensor([12 - place for place in range(rows)])[:, None]
    return Batch(ids.masked_fill(~mask, 0), mask, tuple(range(rows)))


def gradients(model: PreTrainedModel, count: int, rows: int, pads_named: bool = True) -> tuple[float, list[torch.Tensor]]:
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = None
    with Threads(count) as threads:
        loss = TextLoss(model, Training(by_length=not pads_named), threads)(batch(rows))["loss"]
        loss.backward()
    return float(loss.detach()), [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("rows", [1, 5])
def test_shares_have_the_gradients_of_the_whole_batch(model: PreTrainedModel, count: int, rows: int) -> None:
    loss, whole = gradients(model, 1, rows)
    shared_loss, shared = gradients(model, count, rows)
    assert shared_loss == pytest.approx(loss, rel=1e-5)
    assert len(shared) == len(whole)
    for first, second in zip(whole, shared, strict=True):
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-4)


def test_pads_on_the_right_reach_no_real_token(model: PreTrainedModel) -> None:
    loss, named = gradients(model, 1, 5)
    other_loss, unnamed = gradients(model, 1, 5, pads_named=False)
    assert other_loss == pytest.approx(loss, rel=1e-5)
    for first, second in zip(named, unnamed, strict=True):
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-4)


def test_threads_are_given_back_and_an_error_in_one_is_raised() -> None:
    before = torch.get_num_threads()

    def fails() -> None:
        raise ValueError("here")

    with pytest.raises(ValueError, match="here"), Threads(2) as threads:
        assert torch.get_num_threads() == max(1, before // 2)
        threads.run([lambda: None, fails])
    assert torch.get_num_threads() == before
