"""Weights of another's choice in a native mixture, while it trains, with a gradient to its gate.

Its router reads logits in place of x through the gate [I | 0], as when it is overruled (native.py), and makes them weights that
sum to 1; the block's output is scaled by what they are to sum to. So a token without experts gets nothing, and a single
expert's weight has a gradient. Hooks stay: a layer that is computed again for its gradient finds them.

Shape legend: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from modekit.architecture.modekit_router import select

_FAR = 10_000.0  # between two logits: softmax gives the lower one exactly nothing


class ChosenWeights:
    """The choice in one layer: `choose` is a chooser for its slot, `owner` has the gate under `name`."""

    def __init__(
        self, choose: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], block: nn.Module, by_sigmoids: bool
    ) -> None:
        self._choose, self._by_sigmoids = choose, by_sigmoids
        self._top_k_of = next(module for module in block.modules() if hasattr(module, "top_k"))
        self._sums_T1 = torch.ones(1, 1)
        block.register_forward_hook(self._scaled)

    def stand_at(self, router: nn.Module, gate: nn.Parameter) -> None:
        """Take part in what the router computes while it trains."""
        found = ((owner, name) for owner in router.modules() for name, each in owner._parameters.items() if each is gate)
        self._owner, self._name = next(found)
        self._gate = self._owner._parameters[self._name]
        router.register_forward_pre_hook(self._before)
        router.register_forward_hook(self._after, always_call=True)

    def _before(self, router: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        x, gate = args[0], self._owner._parameters[self._name]
        self._gate = gate
        if not router.training or gate is None:
            return None
        logits = nn.functional.linear(x.to(gate.dtype), gate).float()
        weights = self._choose(logits, select(logits, {"method": "routing", "top_k": self._top_k_of.top_k}))
        sums = weights.sum(-1, keepdim=True)
        self._sums_T1 = sums.view(-1, 1)
        shares = torch.where(sums > 0, weights / sums.clamp_min(1e-12), 1.0 / len(gate))
        said = shares.clamp_min(1e-12).log()
        if self._by_sigmoids:  # the sigmoid of this is half the share, and the halves are renormalised
            said = said - torch.log(2.0 - shares)
        said = torch.where(shares > 0, said, -_FAR).to(x.dtype)
        self._owner._parameters[self._name] = nn.Parameter(torch.eye(*gate.shape).to(gate), requires_grad=False)
        return (nn.functional.pad(said, (0, x.shape[-1] - said.shape[-1])), *args[1:])

    def _after(self, *_: object) -> None:
        self._owner._parameters[self._name] = self._gate

    def _scaled(self, block: nn.Module, _: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
        return y * self._sums_T1.view(*y.shape[:-1], 1).to(y.dtype) if block.training else y
