"""Muon: what it moves matrices by is orthogonal, in every dtype of products, whatever shapes come together."""

from __future__ import annotations

import pytest
import torch

from modekit.loaded.muon import Muon, orthogonal


def gradients(count: int, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Matrices with singular values over two orders of magnitude, as gradients have."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(count, rows, columns, generator=generator)
    left, _, right = torch.linalg.svd(made, full_matrices=False)
    spread: torch.Tensor = left * torch.logspace(0, -2, rows) @ right
    return spread


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
def test_singular_values_come_near_one_and_directions_stay(products: torch.dtype) -> None:
    matrices = gradients(3, 16, 40)
    found = orthogonal(matrices.to(products)).float()
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    values = (left.mT @ found @ right.mT).diagonal(dim1=-2, dim2=-1)  # of what turns nothing: its singular values
    assert float(values.min()) > 0.4 and float(values.max()) < 1.7
    turned = found - (left * values.unsqueeze(-2)) @ right
    assert float(turned.abs().max()) < (1e-3 if products == torch.float32 else 0.2)


def test_a_zero_gradient_moves_nothing_but_the_decay() -> None:
    matrix = torch.nn.Parameter(torch.ones(4, 6))
    matrix.grad = torch.zeros(4, 6)
    Muon([matrix], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(matrix.detach(), torch.full((4, 6), 0.95))


def test_matrices_of_several_shapes_move_as_each_alone() -> None:
    shapes = [(4, 6), (6, 4), (4, 6), (5, 5)]
    together = [torch.nn.Parameter(gradients(1, min(s), max(s), place)[0].reshape(s)) for place, s in enumerate(shapes)]
    alone = [torch.nn.Parameter(each.detach().clone()) for each in together]
    steps = [Muon(together, lr=0.1, weight_decay=0.0), *(Muon([each], lr=0.1, weight_decay=0.0) for each in alone)]
    for seed in range(2):
        for place, (first, second) in enumerate(zip(together, alone, strict=True)):
            first.grad = torch.randn(first.shape, generator=torch.Generator().manual_seed(10 * seed + place))
            second.grad = first.grad.clone()
        for optimizer in steps:
            optimizer.step()
    for first, second in zip(together, alone, strict=True):
        torch.testing.assert_close(first.detach(), second.detach(), atol=1e-5, rtol=1e-5)


def test_a_tall_matrix_takes_longer_steps() -> None:
    matrix = torch.nn.Parameter(torch.zeros(9, 1))
    matrix.grad = torch.ones(9, 1)
    Muon([matrix], lr=0.1, weight_decay=0.0).step()
    length = float(torch.linalg.vector_norm(matrix.detach()))
    assert length == pytest.approx(0.1 * 3 * float(orthogonal(torch.ones(1, 1, 9)).norm()), rel=1e-5)
