"""How a distillation is asked for: by losses and their weights."""

from __future__ import annotations

import pytest

from modekit.errors import TrainingError
from modekit.experts.distill.settings import distill_settings, losses_of


@pytest.mark.parametrize(
    "values",
    [
        {"losses": {"forward_kl": 0.0}},
        {"losses": {}},
        {"losses": {"kl": 1.0}},
        {"temperature": 0.0},
        {"weights": 1.1},
        {"weights": -0.1},
        {"adaptive": True},
        {"temperature": float("nan")},
        {"top_k": 3},
    ],
)
def test_wrong_and_dead_settings_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(TrainingError, match="the settings of this distillation are wrong"):
        distill_settings(dict(values), where="test")


def test_losses_are_said_by_name_or_with_a_weight() -> None:
    assert losses_of(["forward_kl", "total_variation=0.5"]) == {"forward_kl": 1.0, "total_variation": 0.5}
    for wrong in (["kl"], ["forward_kl=x"], ["forward_kl=nan"], ["forward_kl", "forward_kl=2"], [""]):
        with pytest.raises(TrainingError, match="unknown loss or weight"):
            losses_of(wrong)
