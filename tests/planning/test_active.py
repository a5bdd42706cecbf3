"""How many parameters are active: what a token runs through, whichever of the experts is the base itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import SMALL, Workshop
from modekit.architecture.modekit_mixed import Mixed
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.loaded.load import load_model
from modekit.planning.make import make_plan
from modekit.recipes.read import load_recipe

RANDOM = {"fit": "random"}
FFN = 3 * 3 * SMALL["hidden_size"] * SMALL["intermediate_size"]
BASE = {"name": "general", "model": "base"}


def with_base(workshop: Workshop, place: int) -> Workshop:
    """Four experts, of which one is the base."""
    workshop.recipe["experts"].insert(place, BASE)
    return workshop


def built(workshop: Workshop, **mixture: Any) -> Checkpoint:
    return open_checkpoint(workshop.build(mixture={"router": RANDOM, **mixture}, output={"format": "modekit"}))


def run_by_a_token(checkpoint: Checkpoint) -> int:
    """Parameters of all modules but those of experts, or the base's, that a single token does not run through.

    With gates of zeros, whose equal weights sum to one without rounding.
    """
    model = load_model(checkpoint.folder)
    for name, parameter in model.named_parameters():
        if name.endswith(".router.gate"):
            parameter.data.zero_()
    idle = {
        id(module): module
        for mixed in model.modules()
        if isinstance(mixed, Mixed)
        for module in (*mixed.experts, *([mixed.base] if mixed.base is not None else []))
    }
    for module in idle.values():
        module.register_forward_hook(lambda module, *_: idle.pop(id(module), None) and None)
    with torch.inference_mode():
        model(input_ids=torch.tensor([[7]]))
    left_out = sum(parameter.numel() for module in idle.values() for parameter in module.parameters())
    return sum(parameter.numel() for parameter in model.parameters()) - left_out


@pytest.mark.parametrize("place", [0, 2, 3])
@pytest.mark.parametrize("top_k", [1, 2])
def test_whoever_is_the_base(bench: Workshop, place: int, top_k: int) -> None:
    checkpoint = built(with_base(bench, place), top_k=top_k)
    counted, planned = checkpoint.parameters, make_plan(load_recipe(bench.root / "recipe.yaml"), bench.root).parameters()
    assert counted.active == counted.dense + planned["router"] + (top_k - 1) * FFN
    assert counted.per_expert == planned["per_expert"] == FFN
    assert (counted.total, counted.active) == (planned["total"], planned["active"])
    assert run_by_a_token(checkpoint) == counted.active


@pytest.mark.parametrize(
    "mixture",
    [
        {"top_k": 1, "always_on": {"expert": "base", "weight": 0.2}},
        {"top_k": 1, "always_on": {"expert": "code", "weight": 0.2}},
        {"top_k": 2, "always_on": {"expert": "code"}},
        {"top_k": 3},
        {"method": "gating"},
        {"method": "linear", "router": None},
        {"top_k": 1, "modules": ["q", "down"]},
        {"top_k": 1, "modules": "all", "router": {**RANDOM, "granularity": "sequence", "per": "model"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("base", [False, True])
def test_what_a_token_runs_through(bench: Workshop, mixture: dict[str, Any], base: bool) -> None:
    """At most: a token that chooses the expert which is always on, or the base beside it, runs through less."""
    if base:
        with_base(bench, 1)
    said = {"router": RANDOM, **mixture}
    said = {key: value for key, value in said.items() if value is not None}
    checkpoint = open_checkpoint(bench.build(mixture=said, output={"format": "modekit"}))
    ran, active = run_by_a_token(checkpoint), checkpoint.parameters.active
    assert ran == active if "always_on" not in mixture else ran <= active <= ran + FFN


def test_of_a_table_of_tokens_a_row_is_read(bench: Workshop) -> None:
    counted = built(bench, top_k=1, router={"fit": "lexical"}).parameters
    assert counted.active == counted.dense < counted.total - 3 * SMALL["vocab_size"]
