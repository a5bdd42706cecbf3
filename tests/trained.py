"""Short trainings, what stops them, and the tensors that they leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from modekit.run import Run
from modekit.training.settings import TrainSettings, checked_settings


def short_settings(**said: Any) -> TrainSettings:
    """A few steps over little text, looked at after each, unless said otherwise."""
    few = {"steps": 3, "batch_tokens": 400, "sequence_length": 64, "select_tokens": 400, "evaluate_every": 1}
    return checked_settings({**few, **said}, TrainSettings, where="test")


class StoppedError(Exception):
    """A kill."""


def stopped(*_: Any, **__: Any) -> Any:
    """In the place of a function: a kill before it does anything."""
    raise StoppedError


def stopped_at(step: int) -> Run:
    """A kill after that step of a training."""

    def progress(stage: str, done: int, _total: int) -> None:
        if stage.startswith("train") and done == step:
            raise StoppedError

    return Run(progress=progress)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by name."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """The tensors whose numbers are others now; names and dtypes must be the same."""
    assert {name: tensor.dtype for name, tensor in before.items()} == {name: each.dtype for name, each in after.items()}
    return {name for name in before if not torch.equal(before[name], after[name])}
