"""Modules that a layer calls one after the other, as one module of which experts can have their own.

In Bart and its like no module holds the FFN: y = fc2(activation(fc1(x))), and the layer calls all three itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


class Chain(nn.Module):
    """Some modules of a layer, in the order in which it calls them; what it drops before the last one is dropped here."""

    def __init__(self, layer: nn.Module, calls: Sequence[str]) -> None:
        super().__init__()
        self._calls = tuple(calls)
        for name in self._calls:
            setattr(self, name, getattr(layer, name))
        self._dropout = float(getattr(layer, "activation_dropout", 0.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D)."""
        *before, last = (getattr(self, name) for name in self._calls)
        for call in before:
            x = call(x)
        x = nn.functional.dropout(x, p=self._dropout, training=self.training)
        y: torch.Tensor = last(x)
        return y


def put_in_place(layer: Any, calls: Sequence[str], module: Any) -> None:
    """Let a layer call `module` first, and nothing after it until it has called all of `calls`."""
    first, *others = calls
    setattr(layer, first, module)
    if hasattr(module, "stand_in"):
        module.stand_in(layer)
    for name in others:
        setattr(layer, name, nn.Identity())
    if hasattr(layer, "activation_dropout"):
        layer.activation_dropout = 0.0  # the chain's
