"""Weights of another's choice in a native mixture, while it trains, with a gradient to its gate.

Its router reads logits in place of x, through the gate [I | 0], as when it is overruled (native.py). It makes them weights that
sum to 1, so that the block's output is scaled by what they sum to: a token without experts gets nothing, and a single expert's
weight has a gradient. Hooks stay, so that a layer that is computed again for its gradient finds them.

Shape legend: B batch, S sequence, T tokens, D width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from modekit.architecture.modekit_router import select

_FAR = 10_000.0  # between two logits: softmax gives the lower one exactly nothing


class ChosenWeights:
    """The choice in one layer: `choose` is a chooser for its slot."""

    def __init__(
        self, choose: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], block: nn.Module, *, by_sigmoids: bool
    ) -> None:
        self._choose, self._block, self._by_sigmoids = choose, block, by_sigmoids
        self._top_k_of = next(module for module in block.modules() if hasattr(module, "top_k"))
        self._sums_T = torch.ones(1)
        self._gate: torch.Tensor | None = None

    def stand_at(self, router: nn.Module, gate: nn.Parameter) -> None:
        """Take part in what the router and the block compute while they train."""
        found = ((owner, name) for owner in router.modules() for name, each in owner._parameters.items() if each is gate)
        self._owner, self._name = next(found)
        router.register_forward_pre_hook(self._before)
        router.register_forward_hook(self._after, always_call=True)
        self._block.register_forward_hook(self._scaled)

    def _before(self, router: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if not router.training:
            return None
        gate_ED, x = self._owner._parameters[self._name], args[0]
        assert gate_ED is not None
        logits = nn.functional.linear(x.to(gate_ED.dtype), gate_ED).float()
        own = select(logits, {"method": "routing", "top_k": self._top_k_of.top_k})
        weights = self._choose(logits, own)
        sums = weights.sum(-1, keepdim=True)
        self._sums_T = sums.flatten()
        shares = torch.where(sums > 0, weights / sums.clamp_min(1e-12), 1.0 / len(gate_ED))
        said = shares.clamp_min(1e-12).log()
        if self._by_sigmoids:  # the sigmoid of this is half the share, and the halves are renormalised
            said = said - torch.log(2.0 - shares)
        said = torch.where(shares > 0, said, -_FAR).to(x.dtype)
        self._gate = gate_ED
        self._owner._parameters[self._name] = torch.eye(*gate_ED.shape, dtype=gate_ED.dtype, device=gate_ED.device)  # type: ignore[assignment]
        return (nn.functional.pad(said, (0, x.shape[-1] - said.shape[-1])), *args[1:])

    def _after(self, *_: object) -> None:
        if self._gate is not None:
            self._owner._parameters[self._name], self._gate = self._gate, None  # type: ignore[assignment]

    def _scaled(self, block: nn.Module, _: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
        return y * self._sums_T.view(*y.shape[:-1], 1).to(y.dtype) if block.training else y
