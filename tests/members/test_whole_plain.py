"""Plain mixtures of whole experts, as a recipe gets them that says nothing of the form: who comes and goes leaves no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from adapter_folders import train_adapter
from conftest import Workshop, make_workshop, save, tiny_model
from members.test_come_and_go import check_same
from modekit.building.build import build
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.members.change import write_change
from modekit.members.edits import NewExpert, add_expert, remove_expert, replace_expert
from modekit.planning.make import make_plan
from modekit.recipes.edit import as_written
from modekit.recipes.read import parse_recipe

MOST = 5
TEXTS = ("medicine", "law", "code")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A base, six adapters of attention and FFN of three kinds, and six models that differ from it everywhere."""
    made = make_workshop(tmp_path_factory.mktemp("whole"), num_hidden_layers=1)
    parts = (["q_proj", "o_proj", "up_proj"], ["k_proj", "v_proj", "down_proj"], "all-linear")
    for number in range(MOST + 1):
        config = LoraConfig(target_modules=parts[number % 3], r=2 + number, lora_alpha=8, use_rslora=number == 1)
        train_adapter(made.root / "base", config, made.root / f"adapter{number}")
        save(tiny_model(seed=20 + number, num_hidden_layers=1), made.root / f"model{number}")
    return made


def expert(kind: str, number: int, name: str = "") -> dict[str, Any]:
    is_adapter = kind == "adapters" or (kind == "both" and number % 2 == 0)
    what, folder = ("adapter", f"./adapter{number}") if is_adapter else ("model", f"./model{number}")
    return {"name": name or f"{what}{number}", what: folder, "text": [f"./text/{TEXTS[number % 3]}.jsonl"]}


def built(shop: Workshop, said: dict[str, Any], out: Path) -> Checkpoint:
    return build(make_plan(parse_recipe(said), shop.root), out)


def new(shop: Workshop, kind: str, number: int) -> NewExpert:
    said = expert(kind, number)
    del said["name"]
    return NewExpert(said, shop.root)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("kind", ["adapters", "models", "both"])
def test_who_comes_and_goes_leaves_no_trace(shop: Workshop, tmp_path: Path, kind: str, count: int) -> None:
    """Each change gives the bytes of a build of the recipe that is left."""
    experts = [expert(kind, number) for number in range(count)]
    first = built(shop, {"base_model": "./base", "experts": experts, "output": {"format": "plain"}}, tmp_path / "first")
    assert first.shape.plain and first.record.carry is not None and first.record.recipe.top_k == 1
    said = as_written(first.record.recipe)

    late = expert(kind, count)
    added = write_change(first, add_expert(first, late["name"], new(shop, kind, count)), tmp_path / "added")
    check_same(added.folder, built(shop, {**said, "experts": [*experts, late]}, tmp_path / "joint").folder)
    assert is_proven(verify(open_checkpoint(added.folder), reload=False))

    removed = write_change(added, remove_expert(added, late["name"]), tmp_path / "removed")
    check_same(removed.folder, first.folder)
    without = write_change(added, remove_expert(added, experts[0]["name"]), tmp_path / "without")
    check_same(without.folder, built(shop, {**said, "experts": [*experts[1:], late]}, tmp_path / "others").folder)

    name = experts[-1]["name"]
    replaced = write_change(first, replace_expert(first, name, new(shop, kind, count)), tmp_path / "replaced")
    other = {**expert(kind, count, name)}
    check_same(replaced.folder, built(shop, {**said, "experts": [*experts[:-1], other]}, tmp_path / "wanted").folder)
