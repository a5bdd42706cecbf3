"""How much the text counts against the teacher: the rule of arXiv:2407.19610, and what it does where theirs divides by zero."""

from __future__ import annotations

import pytest
import torch

from conftest import tiny_model
from modekit.errors import TrainingError
from modekit.experts.distill.student import CROSS_ENTROPY, DISTILLATION, Lesson, Student, adaptive_share
from modekit.experts.settings import DistillSettings
from modekit.training.settings import checked_settings, train_settings

FALLING = [3.0 - 0.01 * step for step in range(20)]


def test_while_both_losses_fall_the_share_is_exactly_one_half() -> None:
    assert adaptive_share(FALLING, [0.1 * value**2 for value in FALLING]) == 0.5


def test_a_text_loss_that_rises_by_half_its_mean_counts_a_third() -> None:
    rising = [0.75, 1.0, 1.25]  # by 0.5, of a mean of 1
    assert adaptive_share(rising, FALLING) == pytest.approx(1 / 3)
    assert adaptive_share(FALLING, rising) == pytest.approx(2 / 3)


def test_only_the_last_steps_are_remembered() -> None:
    model, losses = tiny_model(num_hidden_layers=1), {"lm": torch.tensor(1.0), "distill": torch.tensor(1.0)}
    lesson = Lesson(tiny_model(seed=4, num_hidden_layers=1), 96, DistillSettings(adaptive=True))
    student = Student(model, lesson, train_settings({"what": ["all"]}, where="test"), 100)
    assert student.weights(losses) == {"lm": 0.5, "distill": 0.5}
    rising = [9.0, *(1.0 + 0.01 * step for step in range(20))]  # the first was long ago: the next 20 rise
    student.go_on([{CROSS_ENTROPY: value, DISTILLATION: 1.0} for value in rising])
    assert student.weights(losses)["lm"] == pytest.approx((1 - 0.19 / 1.095) / (2 - 0.19 / 1.095))


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
    for said in (["forward_kl", "total_variation=0.5"], "forward_kl,total_variation=0.5"):
        found = checked_settings({"losses": said}, DistillSettings, where="test")
        assert found.losses == {"forward_kl": 1.0, "total_variation": 0.5}
    for wrong in (["kl"], ["forward_kl=x"], ["forward_kl=nan"], ["forward_kl", "forward_kl=2"], [""]):
        with pytest.raises(TrainingError, match="unknown loss or weight"):
            checked_settings({"losses": wrong}, DistillSettings, where="test")
