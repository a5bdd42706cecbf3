"""What Trainer trains here: a model with its losses as one module, of which the trainer needs to know no more than this."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from modekit.training.settings import TrainSettings


class TrainedModule(nn.Module):
    """A batch goes in, {"loss": ...} comes out. What is trained is the submodule that `prefix` names.

    Attributes:
        prefix: the submodule's name, with which a state's names begin.
        config: of the model.
        settings: rates, warm-up, clipping, patience, and how often states are kept.
        moving: names of the parameters that move, within the submodule.
        gate_names: those of them that have a router's rate.
        skips_parameters: whether a step may leave some that move without a gradient.
    """

    prefix: str
    config: Any
    settings: TrainSettings
    moving: list[str]
    gate_names: list[str]
    skips_parameters: bool

    def drain(self) -> dict[str, float]:
        """Figures of the step that has just ended, for the log. Called once per step."""
        raise NotImplementedError

    def as_configured(self) -> AbstractContextManager[None]:
        """While open, the model is as it will be used."""
        return nullcontext()

    def go_on(self, history: Sequence[Mapping[str, float]]) -> None:
        """Called before the first step, with the log of the steps before: those of a training that is gone on with."""
