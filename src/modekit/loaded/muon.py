"""Muon for small models on processors: the momentum of every matrix made orthogonal, matrices of one shape together.

torch.optim.Muon multiplies in bfloat16, one matrix at a time and in five steps; where a processor has no bfloat16 products
that takes several times as long as the forward and backward pass. Here products are in the dtype that is fast, and four steps
lift small singular values as far as its five.

Shape legend: K matrices of one shape, M the shorter and N the longer side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, overload

import torch

from modekit.loaded.threads import Threads

# Polar Express (arXiv:2505.16932), first four of the polynomials that converge fastest from singular values above 0.001.
_POLYNOMIALS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
)
_MARGIN = 1.02  # the polynomials grow beyond singular values of 1: rounding must not carry one there
_MOMENTUM = 0.95


def orthogonal(matrices_KMN: torch.Tensor) -> torch.Tensor:
    """The nearest matrices whose singular values are near 1 (0.4 to 1.6), for K matrices with M <= N, in their dtype."""
    lengths = torch.linalg.matrix_norm(matrices_KMN, keepdim=True).clamp_min(1e-7)
    x: torch.Tensor = matrices_KMN / (lengths * _MARGIN)
    for a, b, c in _POLYNOMIALS:
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """Momentum of matrices (Nesterov, 0.95), made orthogonal in `products`; steps of lr times sqrt(max(1, rows / columns)).

    The matrices, each of which has a gradient, are dealt out to threads. All `others` are AdamW's.
    """

    def __init__(
        self,
        matrices: Sequence[torch.nn.Parameter],
        others: torch.optim.AdamW | None = None,
        *,
        lr: float,
        weight_decay: float,
        products: torch.dtype = torch.float32,
        threads: Threads | None = None,
    ) -> None:
        dealt = threads.count if threads is not None else 1
        shares = [{"params": list(matrices[place::dealt])} for place in range(min(dealt, len(matrices)))]
        self._shares = len(shares)
        super().__init__(
            [*shares, *(others.param_groups if others is not None else [])], {"lr": lr, "weight_decay": weight_decay}
        )
        self._others, self._products, self._threads = others, products, threads

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move everything once; no closure is taken."""
        assert closure is None
        jobs: list[Callable[[], object]] = [partial(self._move, group) for group in self.param_groups[: self._shares]]
        if self._others is not None:  # a state that was read back has new groups
            self._others.param_groups, self._others.state = self.param_groups[self._shares :], self.state
            jobs.append(self._others.step)
        if self._threads is not None:
            self._threads.run(jobs)
        else:
            for job in jobs:
                job()
        return None

    @torch.no_grad()
    def _move(self, group: Mapping[str, Any]) -> None:
        by_shape: dict[tuple[int, ...], list[torch.nn.Parameter]] = {}
        for matrix in group["params"]:
            by_shape.setdefault(tuple(sorted(matrix.shape)), []).append(matrix)
        for matrices in by_shape.values():
            for matrix, update in zip(matrices, self._updates(matrices), strict=True):
                rows, columns = matrix.shape
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * math.sqrt(max(1.0, rows / columns)))

    def _updates(self, matrices: Sequence[torch.nn.Parameter]) -> list[torch.Tensor]:
        """The orthogonal momentum of matrices that have one shape when the shorter side stands first."""
        wide = []
        for matrix in matrices:
            assert matrix.grad is not None
            momentum = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
            momentum.lerp_(matrix.grad, 1 - _MOMENTUM)
            update = matrix.grad.lerp(momentum, _MOMENTUM)
            wide.append(update if matrix.shape[0] <= matrix.shape[1] else update.mT)
        found = orthogonal(torch.stack(wide).to(self._products)).float()
        return [each if m.shape[0] <= m.shape[1] else each.mT for each, m in zip(found, matrices, strict=True)]
