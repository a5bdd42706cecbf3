"""`fit: auto` in a plan and a build: what models and forms of result make of it, and that its recipe gives the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adapter_folders import lora, write_adapter
from conftest import DOMAINS, Workshop, make_workshop
from modekit.building.build import build
from modekit.building.preview import preview_of
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.planning.make import make_plan
from modekit.planning.plan import Plan
from modekit.planning.reuse import digest_of
from modekit.recipes.edit import as_written
from modekit.recipes.read import parse_recipe
from modekit.routing.fit import refit

pytestmark = pytest.mark.usefixtures("short_tables")
TOKENS, PAIRS, LOGISTIC = ({"fit": "lexical"}, {"fit": "lexical", "orders": [1, 2]}, {"fit": "logistic"})
NATIVE, MODEKIT = {"format": "plain"}, {"format": "modekit"}
Case = tuple[str, bool, dict[str, Any], dict[str, Any], dict[str, Any], bool]
CASES: dict[str, Case] = {  # experts, whether with text, mixture, output -> router, whether a plain checkpoint
    "models": ("model", True, {}, {}, TOKENS, True),
    "models, FFNs alone": ("model", True, {}, {"carry": "ffn"}, TOKENS, True),
    "models, modekit": ("model", True, {}, MODEKIT, PAIRS, False),
    "whole models": ("model", True, {"modules": "all"}, {}, PAIRS, False),
    "adapters": ("adapter", True, {}, {}, TOKENS, True),
    "adapters, modekit": ("adapter", True, {}, MODEKIT, PAIRS, False),
    "adapters, native": ("adapter", True, {}, NATIVE, TOKENS, True),
    "adapters, context": ("adapter", True, {"router": {"granularity": "context"}}, {}, LOGISTIC, False),
    "adapters without text": ("adapter", False, {}, {}, {"fit": "arrow", "granularity": "context"}, False),
    "adapters without text, native": ("adapter", False, {}, NATIVE, {}, True),
    "models without text": ("model", False, {}, {}, {}, True),
    "models without text, routed": ("model", False, {"method": "routing"}, {}, {"fit": "random"}, True),
}


@pytest.fixture(scope="module")
def shop(small_workshop: Workshop) -> Workshop:
    for seed, name in enumerate(DOMAINS, 1):
        write_adapter(small_workshop.root / f"{name}-lora", lora("mlp.up_proj", 48, 32, layers=1, seed=seed))
    return small_workshop


def recipe(kind: str, text: bool, mixture: dict[str, Any], output: dict[str, Any]) -> dict[str, Any]:
    where = {"model": "./{}", "adapter": "./{}-lora"}[kind]
    said = [{"name": name, kind: where.format(name)} for name in DOMAINS]
    experts = [{**each, "text": f"./text/{each['name']}.jsonl"} for each in said] if text else said
    return {"base_model": "./base", "experts": experts, "mixture": mixture, "output": output}


def planned(root: Path, *said: Any) -> Plan:
    return make_plan(parse_recipe(recipe(*said)), root)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_plan_names_the_router_and_says_why(shop: Workshop, case: Case) -> None:
    *said, router, plain = case
    plan = planned(shop.root, *said)
    mixture = plan.recipe.mixture
    chosen = mixture.router.model_dump(exclude_unset=True)
    assert ({} if mixture.method == "linear" else {key: chosen[key] for key in router}) == router
    assert plan.shape.plain == plain and not mixture.is_open and preview_of(plan).router_why
    assert digest_of(planned(shop.root, *said)) == digest_of(plan)


@pytest.mark.parametrize(
    ("family", "asked", "output", "router", "plain"),
    [
        ("cohere2", {}, {}, PAIRS, False),
        ("cohere2", TOKENS, {}, TOKENS, False),
        ("cohere2", {}, NATIVE, LOGISTIC, True),
        ("qwen3", {}, {}, TOKENS, True),
    ],
)
def test_where_no_plain_checkpoint_carries_tokens(
    tmp_path: Path, family: str, asked: dict[str, Any], output: dict[str, Any], router: dict[str, Any], plain: bool
) -> None:
    shop = make_workshop(tmp_path, family, num_hidden_layers=1)
    plan = planned(shop.root, "model", True, {"router": asked} if asked else {}, output)
    assert (plan.recipe.mixture.router.model_dump(exclude_unset=True), plan.shape.plain) == (router, plain)
    assert not asked or "subtract the mean" in plan.why


@pytest.mark.parametrize("name", ["models", "models, modekit", "adapters, native", "adapters without text"])
def test_the_recipe_of_a_build_builds_the_same_bytes(shop: Workshop, tmp_path: Path, name: str) -> None:
    plan = planned(shop.root, *CASES[name][:4])
    made = build(plan, tmp_path / "OUT")
    assert made.record.recipe == plan.recipe and is_proven(verify(open_checkpoint(made.folder), reload=False))
    again = build(make_plan(parse_recipe(as_written(made.record.recipe)), shop.root), tmp_path / "AGAIN")
    for file in (each for each in made.folder.rglob("*") if each.is_file() and ".modekit" not in each.parts):
        assert (again.folder / file.relative_to(made.folder)).read_bytes() == file.read_bytes(), file.name


def test_a_refit_takes_the_best_that_the_tensors_allow(shop: Workshop, tmp_path: Path) -> None:
    def settled(checkpoint: Checkpoint, **changes: Any) -> dict[str, Any]:
        return refit(checkpoint, changes).record.recipe.mixture.router.model_dump(exclude_unset=True)

    fewer = {"fit": "logistic", "tokens_per_domain": 200, "sequence_length": 32}
    for output, router in ((MODEKIT, PAIRS), (NATIVE, LOGISTIC)):
        out = build(planned(shop.root, "model", True, {"router": fewer}, output), tmp_path / output["format"])
        assert settled(out, router={"fit": "auto"}) == router
    fixed = build(planned(shop.root, "model", True, {"method": "linear"}, MODEKIT), tmp_path / "linear")
    assert settled(fixed, method="routing") == PAIRS
