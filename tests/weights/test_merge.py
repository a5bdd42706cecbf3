"""Backbone merges against short reference implementations in torch, and merging copies gives the model back."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from checkpoint_states import DTYPES, RANDOM, State, result_of, states_of, store
from conftest import Workshop
from modekit.recipes.backbone import BackboneMerge
from modekit.weights.merge import merged as merge_of
from modekit.weights.numeric import DTYPES as NUMPY_DTYPES
from modekit.weights.numeric import blocks as blocks_of
from refusal import tree

Reference = Callable[[BackboneMerge, torch.Tensor, list[torch.Tensor]], torch.Tensor]


def average(_settings: BackboneMerge, _base: torch.Tensor, experts: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(experts).mean(0)


def task_arithmetic(settings: BackboneMerge, base: torch.Tensor, experts: list[torch.Tensor]) -> torch.Tensor:
    return base + settings.scale * sum(expert - base for expert in experts)


def ties(settings: BackboneMerge, base: torch.Tensor, experts: list[torch.Tensor]) -> torch.Tensor:
    """Algorithm 1, arXiv:2306.01708, over the whole tensor at once; magnitudes in float32."""
    trimmed = []
    for expert in experts:
        delta = (expert - base).flatten()
        size = delta.abs().float()
        least = size.topk(max(1, math.ceil(settings.density * len(delta)))).values.min()
        trimmed.append(torch.where(size >= least, delta, 0.0))
    deltas = torch.stack(trimmed)
    sign = deltas.sum(0).sign()
    agrees = (deltas.sign() == sign) & (sign != 0)
    mean = torch.where(agrees, deltas, 0.0).sum(0) / agrees.sum(0).clamp(min=1)
    return base + settings.scale * mean.view_as(base)


CASES: list[tuple[dict[str, Any], Reference, int]] = [
    ({"method": "average"}, average, 3),
    ({"method": "average"}, average, 1),
    ({"method": "task_arithmetic"}, task_arithmetic, 3),
    ({"method": "task_arithmetic", "scale": -0.4}, task_arithmetic, 3),
    ({"method": "ties"}, ties, 3),
    ({"method": "ties", "density": 0.01, "scale": 0.7}, ties, 3),
    ({"method": "ties", "density": 1.0}, ties, 2),
    ({"method": "ties", "density": 0.5}, ties, 1),
]
IDS = ["-".join(map(str, [*settings.values(), count])) for settings, _, count in CASES]


@pytest.mark.parametrize(("settings", "reference", "count"), CASES, ids=IDS)
@pytest.mark.parametrize("block", [7, 2**21])
def test_a_merge_is_its_equation(
    settings: dict[str, Any], reference: Reference, count: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modekit.weights.numeric.BLOCK", block)
    generator = torch.Generator().manual_seed(3)
    base, *experts = torch.randn((1 + count, 12, 17), generator=generator)
    experts[0][0, :5] = base[0, :5]
    merge = BackboneMerge(**settings)
    arrays = [tensor.flatten().numpy() for tensor in (base, *experts)]
    array = merge_of(merge, arrays[0], arrays[1:])
    merged = [array[part] for part in blocks_of(len(array))]
    assert all(part.dtype == np.float64 for part in merged)
    wanted = reference(merge, base.double(), [expert.double() for expert in experts])
    torch.testing.assert_close(torch.from_numpy(np.concatenate(merged)).view(12, 17), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("settings", "reference", "count"), CASES, ids=IDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merged_backbone(
    bench: Workshop, settings: dict[str, Any], reference: Reference, count: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.recipe.update(experts=bench.recipe["experts"][:count], mixture={**RANDOM, "backbone": settings})
    base, experts = states_of(bench)
    whole = bench.build(output={"dtype": dtype})
    found = result_of(whole)
    for name, tensor in base.items():
        if ".mlp." in name:
            continue
        wanted = reference(BackboneMerge(**settings), tensor.double(), [expert[name].double() for expert in experts])
        assert found[name].dtype == DTYPES[dtype]
        tolerance = {"rtol": 2e-7, "atol": 1e-9} if dtype == "float32" else {"rtol": 2**-8, "atol": 1e-9}
        torch.testing.assert_close(found[name].double(), wanted, **tolerance)
    bench.recipe["output"] = {"dtype": dtype}
    monkeypatch.setattr("modekit.weights.numeric.BLOCK", 101)
    blocks = bench.build("BLOCKS")
    assert tree(blocks) == tree(whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "backbone",
    ["average", "task_arithmetic", {"method": "task_arithmetic", "scale": 0.3}, "ties"],
)
def test_merging_copies_gives_the_model_back(bench: Workshop, dtype: str, backbone: Any) -> None:
    store(bench, DTYPES[dtype])
    base, _ = states_of(bench)
    experts = [{"name": f"copy{place}", "model": "./base"} for place in range(5)]
    found = result_of(bench.build(experts=experts, mixture={**RANDOM, "backbone": backbone}))
    for name, tensor in base.items():
        if ".mlp." not in name:
            assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("backbone", ["average", "task_arithmetic", {"method": "ties", "density": 1.0}])
def test_merging_a_single_expert_gives_its_backbone(bench: Workshop, backbone: Any) -> None:
    experts = [bench.recipe["experts"][1], {"name": "plain", "model": "base"}]
    bench.recipe["experts"] = experts[:1]
    _, (law,) = states_of(bench)
    found = result_of(bench.build(experts=experts, mixture={**RANDOM, "backbone": backbone}))
    for name, tensor in law.items():
        if ".mlp." not in name:
            assert torch.equal(found[name], tensor), name


def test_ties_ignores_experts_that_did_not_move() -> None:
    base = np.zeros(40, np.float32)
    moved = base.copy()
    moved[3], moved[4] = 2.0, -1e-30
    settings = BackboneMerge(method="ties", density=0.1)
    merged = merge_of(settings, base, [base, moved])[:]
    assert merged[3] == 2.0
    assert np.count_nonzero(merged) == 2


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_sources_of_any_dtype_are_read_exactly(dtype: str) -> None:
    base, one, two = (np.linspace(low, 3, 33).astype(NUMPY_DTYPES[dtype]) for low in (-3, -2, 1))
    merged = merge_of(BackboneMerge(method="average"), base, [one, two])[:]
    np.testing.assert_array_equal(merged, (one.astype(np.float64) + two.astype(np.float64)) / 2)


def test_a_merge_leaves_the_experts_alone(bench: Workshop) -> None:
    plain: State = result_of(bench.build("PLAIN", mixture=RANDOM))
    merged = result_of(bench.build("MERGED", mixture={**RANDOM, "backbone": "average"}))
    same = {name for name in plain if torch.equal(plain[name], merged[name])}
    assert same == {name for name in plain if ".experts." in name}
