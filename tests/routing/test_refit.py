"""A router set anew: what may change in a finished checkpoint, what needs another build, and that `verify` goes on to hold."""

from __future__ import annotations

import json
from typing import Any

import pytest

from conftest import Workshop
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.open import open_checkpoint
from modekit.errors import RecipeError
from modekit.recipes.read import parse_recipe
from modekit.routing.fit import refit
from refusal import refuse
from rounding import assert_same_checkpoint

pytestmark = pytest.mark.usefixtures("short_tables")

TEXT = {"tokens_per_domain": 400, "sequence_length": 32}
CONTEXT = {"fit": "logistic", "granularity": "context", **TEXT}


@pytest.mark.parametrize(
    ("built", "changes"),
    [
        ({"router": CONTEXT}, {"router": {"granularity": "token"}}),
        ({"router": {**CONTEXT, "decay": [0.5, 0.9]}}, {"router": {"granularity": "sequence"}}),
        ({"router": CONTEXT, "top_p": 0.5}, {"top_k": 1}),
        ({"router": CONTEXT, "top_p": 0.5, "always_on": {"expert": "law", "weight": 0.3}}, {"method": "linear"}),
        (
            {"method": "linear", "modules": ["q", "mlp"], "weights": {"medicine": 2.0, "law": 1.0, "code": 1.0}},
            {"method": "routing", "router": CONTEXT},
        ),
        ({"router": {**CONTEXT, "l2": 0.1, "decay": [0.5]}}, {"router": {"fit": "random", "granularity": "token"}}),
        ({"router": CONTEXT, "modules": ["q", "v", "mlp"]}, {"router": {"per": "model"}}),
        ({"router": {**CONTEXT, "per": "feature"}, "modules": ["k", "down"]}, {"router": {"per": "layer"}}),
        (
            {"modules": "auto", "router": {"fit": "lexical", "orders": [1, 2], "buckets": 64, "decay": [0.5]}},
            {"router": CONTEXT},
        ),
    ],
)
def test_a_changed_router_is_what_its_recipe_builds(workshop: Workshop, built: dict[str, Any], changes: dict[str, Any]) -> None:
    out = workshop.build(mixture=built)
    done = refit(open_checkpoint(out), changes)
    assert is_proven(verify(done))
    recipe = done.record.recipe.model_dump(mode="json", exclude_unset=True)
    fresh = workshop.build("FRESH", mixture=recipe["mixture"], output=recipe["output"])
    assert_same_checkpoint(out, fresh)


@pytest.mark.parametrize(
    ("built", "changes", "where"),
    [
        ({}, {"backbone": "average"}, "backbone"),
        ({"modules": ["mlp", "q"]}, {"modules": ["mlp"]}, "modules"),
        ({"router": CONTEXT}, {"router": {"per": "projection"}}, "per"),
        (
            {"modules": "all", "router": {"fit": "lexical", "orders": [1, 2], "buckets": 512}},
            {"router": {"fit": "logistic"}},
            "router.fit",
        ),
        (
            {"modules": ["mlp"], "top_k": 1, "router": {"fit": "lexical"}},
            {"router": {"fit": "logistic"}},
            "set fit=lexical, the only router of this plain mixture",
        ),
        ({"router": {"fit": "random"}}, {"router": CONTEXT}, "a plain checkpoint cannot have granularity: context"),
        ({"method": "linear", "weights": {"medicine": 2.0, "law": 1.0, "code": 1.0}}, {"method": "routing"}, "weights"),
    ],
)
def test_what_needs_another_build_is_refused(
    workshop: Workshop, short_tables: None, built: dict[str, Any], changes: dict[str, Any], where: str
) -> None:
    out = workshop.build(mixture=built if "method" in built else {"router": {"fit": "random"}, **built})
    before = {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()}
    with pytest.raises(RecipeError) as caught:
        refit(open_checkpoint(out), changes)
    assert where in str(caught.value)
    assert before == {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()}


@pytest.mark.parametrize("mixture", [{"method": "gating"}, {"top_k": 1}])
def test_an_always_on_expert_without_a_weight_must_leave_a_choice(workshop: Workshop, mixture: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="'always_on' without a weight"):
        parse_recipe({**workshop.recipe, "mixture": {"router": {"fit": "random"}, "always_on": {"expert": "law"}, **mixture}})


@pytest.mark.parametrize(
    "damage",
    [
        lambda mixture: mixture.pop("dense_type"),
        lambda mixture: mixture["places"].update(more={}),
        lambda mixture: next(iter(mixture["places"].values())).update(ranks=["a"]),
        lambda mixture: next(iter(mixture["places"].values())).update(own=[7]),
        lambda mixture: mixture["routing"].update(method="guess"),
    ],
)
def test_a_damaged_config_is_named(workshop: Workshop, damage: Any) -> None:
    out = workshop.build(mixture={"router": {"fit": "random"}, "modules": ["q", "mlp"]})
    config = json.loads((out / "config.json").read_text())
    damage(config["modekit"])
    (out / "config.json").write_text(json.dumps(config))
    assert "config.json does not say what is mixed" in refuse("verify", out)
