"""A place that is itself a mixture, whose adapters stay low-rank: its gate, and the experts that it routes to.

Each expert of the modekit mixture runs on the tokens that give it weight, with its own change of the place's tensors W:

    W'_e = W_e + s B_e A_e        y_e = W_e x + s B_e (A_e x)        of the experts e that the place's own gate chooses

so that the routed work is that of one such model where a token has one expert. A (E R, I) of every adapter has the place's
expert slowest, B (O, R E) has it fastest, bit for bit as PEFT keeps them. Tensors of two axes, such as the gate, are changed
while the place runs: they are small.

Shape legend: B batch, S sequence, T tokens, E experts of the place, K those of a token, R rank, I and O width in and out.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from .modekit_any import MixedAny


class Inside(nn.Module):
    """The changes of one tensor of a place by all adapters: A (sum of E R, I) and B (O, sum of R E)."""

    def __init__(self, weight: torch.Tensor, said: Mapping[str, Any], *, turned: bool) -> None:
        super().__init__()
        self.ranks: list[int] = list(said["ranks"])
        self.scales: list[float] = list(said["scales"])
        self.experts = weight.shape[0] if weight.ndim == 3 else 1
        inputs, outputs = weight.shape[-2:] if turned else (weight.shape[-1], weight.shape[-2])
        self.lora_A = nn.Parameter(torch.zeros(self.experts * sum(self.ranks), inputs))
        self.lora_B = nn.Parameter(torch.zeros(outputs, self.experts * sum(self.ranks)))

    def of(self, adapter: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A (E, R, I) and s B (O, R, E) of one adapter; None where it changes nothing here."""
        first, count = (self.experts * sum(each) for each in (self.ranks[:adapter], self.ranks[adapter : adapter + 1]))
        if not count:
            return None
        a_ERI = self.lora_A[first : first + count].reshape(self.experts, -1, self.lora_A.shape[1])
        b_ORE = self.lora_B[:, first : first + count].reshape(self.lora_B.shape[0], -1, self.experts)
        return a_ERI, b_ORE * self.scales[adapter]


class MixedInside(MixedAny):
    """A place with `inside`: for a `tensor` of the module, by its name there, `ranks` and `scales` of every expert's change."""

    def __init__(self, name: str, dense: nn.Module, place: Mapping[str, Any], *args: Any) -> None:
        super().__init__(name, dense, place, *args)
        self._paths: dict[str, str] = {said["tensor"]: said["tensor"].replace(".", "-") for said in place["inside"]}
        self._running: int | None = None
        self.inside = nn.ModuleDict()
        for said in place["inside"]:
            owner, _, leaf = said["tensor"].rpartition(".")
            module = dense.get_submodule(owner)
            weight: torch.Tensor = getattr(module, leaf)
            turned = weight.ndim == 3 and bool(getattr(module, "is_transposed", False))
            self.inside[self._paths[said["tensor"]]] = Inside(weight, said, turned=turned)
            if weight.ndim == 3:
                module.forward = partial(self._routed, module, owner)
        experts = range(len(self.ranks))
        self.adapters = [expert for expert in experts if any(said["ranks"][expert] for said in place["inside"])]

    def _of_one(self, expert: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._adapted(expert, args, kwargs) if expert in self.adapters else super()._of_one(expert, args, kwargs)

    def _sum_of_all(self, args: tuple[Any, ...], kwargs: dict[str, Any], weights: torch.Tensor) -> Any:
        """Every expert on its tokens: a place of this kind looks at each token alone."""
        (x,) = (*args, *kwargs.values())
        weights_TE = weights.expand(*x.shape[:2], -1).flatten(0, 1)
        parts = [(expert, weights_TE[:, expert]) for expert in (*self.own, *self.adapters)]
        left_T = 1.0 - torch.stack([weight for _, weight in parts]).sum(0)
        parts.append((-1, torch.where(left_T.abs() < 1e-6, 0.0, left_T)))
        total = torch.zeros_like(x).flatten(0, 1)
        beside = ()
        for expert, weight_T in parts:
            rows = weight_T.nonzero().squeeze(-1)
            if len(rows) == 0:
                continue
            y = self._of_one(expert, (x.flatten(0, 1)[rows][None],), {})
            y, beside = (y[0], y[1:]) if isinstance(y, tuple) else (y, ())
            total = total.index_add(0, rows, y[0] * weight_T[rows, None].to(y.dtype))
        return (total.view(x.shape), *beside) if beside else total.view(x.shape)

    def _adapted(self, adapter: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the base's module gives with one adapter's changes."""
        assert self.base is not None
        changed = {}
        for path, key in self._paths.items():
            weight, change = self.base.get_parameter(path), self.inside[key].of(adapter)  # type: ignore[operator]
            if weight.ndim == 2 and change is not None:
                a_1RI, b_OR1 = change
                changed[path] = weight + (b_OR1[..., 0] @ a_1RI[0]).to(weight.dtype)
        self._running = adapter
        try:
            return functional_call(self.base, changed, args, kwargs)
        finally:
            self._running = None

    def _routed(self, experts: Any, owner: str, x_TI: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor) -> Any:
        """The routed experts with one adapter's changes of them: as transformers computes them one after the other."""
        changes = {}
        for leaf in ("gate_up_proj", "up_proj", "down_proj") if self._running is not None else ():
            key = self._paths.get(f"{owner}.{leaf}" if owner else leaf)
            changes[leaf] = None if key is None else self.inside[key].of(self._running)  # type: ignore[operator]
        if not any(changes.values()):
            return type(experts).forward(experts, x_TI, index_TK, weight_TK)

        def linear(x: torch.Tensor, leaf: str, expert: int) -> torch.Tensor:
            weight = getattr(experts, leaf)[expert]
            bias = getattr(experts, f"{leaf}_bias", None)
            y = nn.functional.linear(x, weight.t() if experts.is_transposed else weight, None if bias is None else bias[expert])
            change = changes[leaf]
            if change is None:
                return y
            a_ERI, b_ORE = change
            return y + nn.functional.linear(nn.functional.linear(x, a_ERI[expert].to(x.dtype)), b_ORE[..., expert].to(x.dtype))

        y_TO = torch.zeros_like(x_TI)
        for expert in torch.unique(index_TK).tolist():
            tokens, choices = torch.where(index_TK == expert)
            if experts.has_gate:
                hidden = experts._apply_gate(linear(x_TI[tokens], "gate_up_proj", expert))
            else:
                hidden = experts.act_fn(linear(x_TI[tokens], "up_proj", expert))
            y = linear(hidden, "down_proj", expert) * weight_TK[tokens, choices, None]
            y_TO = y_TO.index_add(0, tokens, y.to(y_TO.dtype))
        return y_TO
