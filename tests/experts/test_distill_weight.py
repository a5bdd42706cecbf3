"""How much the text counts against the teacher: the rule of arXiv:2407.19610, and what it does where theirs divides by zero."""

from __future__ import annotations

import pytest

from modekit.errors import TrainingError
from modekit.experts.distill.settings import DistillSettings, losses_of
from modekit.experts.distill.student import CrossEntropyWeight, adaptive_share
from modekit.training.settings import checked_settings

FALLING = [3.0 - 0.01 * step for step in range(20)]


def test_while_both_losses_fall_the_share_is_exactly_one_half() -> None:
    assert adaptive_share(FALLING, [0.1 * value**2 for value in FALLING]) == 0.5


def test_a_text_loss_that_rises_by_half_its_mean_counts_a_third() -> None:
    rising = [0.75, 1.0, 1.25]  # by 0.5, of a mean of 1
    assert adaptive_share(rising, FALLING) == pytest.approx(1 / 3)
    assert adaptive_share(FALLING, rising) == pytest.approx(2 / 3)


def test_only_the_last_steps_are_remembered() -> None:
    weight = CrossEntropyWeight(DistillSettings(adaptive=True), steps=100)
    assert weight.share() == 0.5
    weight.remember(9.0, 1.0)  # long ago: the next 20 rise
    for step in range(20):
        weight.remember(1.0 + 0.01 * step, 1.0)
    assert weight.share() == pytest.approx((1 - 0.19 / 1.095) / (2 - 0.19 / 1.095))


@pytest.mark.parametrize(
    "values",
    [
        {"losses": {"forward_kl": 0.0}},
        {"adaptive": True, "weights": 0.5},
        {"temperature": float("nan")},
    ],
)
def test_wrong_and_dead_settings_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(TrainingError, match="the settings of this training are wrong"):
        checked_settings(dict(values), DistillSettings, where="test")


def test_losses_are_said_by_name_or_with_a_weight() -> None:
    assert losses_of(["forward_kl", "total_variation=0.5"]) == {"forward_kl": 1.0, "total_variation": 0.5}
    for wrong in (["kl"], ["forward_kl=x"], ["forward_kl=nan"], ["forward_kl", "forward_kl=2"], [""]):
        with pytest.raises(TrainingError, match="unknown loss or weight"):
            losses_of(wrong)
