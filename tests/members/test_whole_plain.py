"""Plain mixtures of whole experts, as a recipe gets them that says nothing of the form: who comes and goes leaves no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from adapter_folders import train_adapter
from conftest import Workshop, make_workshop, save, tiny_model
from members.test_come_and_go import built, check_same, gone, new
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.open import open_checkpoint
from modekit.errors import SourceError
from modekit.members.change import write_change
from modekit.members.edits import add_expert, remove_expert, replace_expert
from modekit.recipes.edit import as_written

pytestmark = pytest.mark.usefixtures("short_tables")
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
    for number in range(3):
        model, other = tiny_model(seed=0, num_hidden_layers=1), tiny_model(seed=30 + number, num_hidden_layers=1)
        model.model.layers[0].mlp.load_state_dict(other.model.layers[0].mlp.state_dict())
        save(model, made.root / f"ffn{number}")
    return made


def expert(kind: str, number: int, name: str = "") -> dict[str, Any]:
    is_adapter = kind == "adapters" or (kind == "both" and number % 2 == 0)
    folder = f"./ffn{number}" if kind == "ffns" else f"./adapter{number}" if is_adapter else f"./model{number}"
    what = "adapter" if is_adapter else "model"
    return {"name": name or f"{what}{number}", what: folder, "text": [f"./text/{TEXTS[number % 3]}.jsonl"]}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), [("adapters", 2), ("models", 2), ("both", 2), ("both", 4)])
def test_who_comes_and_goes_leaves_no_trace(shop: Workshop, tmp_path: Path, kind: str, count: int) -> None:
    """Each change gives the bytes of a build of the recipe that is left."""
    experts = [expert(kind, number) for number in range(count)]
    first = built(shop, {"base_model": "./base", "experts": experts, "output": {"format": "plain"}}, tmp_path / "first")
    assert first.shape.plain and first.record.carry is not None and first.record.recipe.top_k == 1
    said = as_written(first.record.recipe)
    said["mixture"].pop("backbone", None)  # what full models share is chosen anew

    late = expert(kind, count)
    added = write_change(first, add_expert(first, late["name"], new(shop, late)), tmp_path / "added")
    check_same(added.folder, built(shop, {**said, "experts": [*experts, late]}, tmp_path / "joint").folder)
    assert is_proven(verify(open_checkpoint(added.folder), reload=False))

    removed = write_change(added, remove_expert(added, late["name"]), tmp_path / "removed")
    check_same(removed.folder, first.folder)
    without = write_change(added, remove_expert(added, experts[0]["name"]), tmp_path / "without")
    check_same(without.folder, built(shop, {**said, "experts": [*experts[1:], late]}, tmp_path / "others").folder)

    name = experts[-1]["name"]
    replaced = write_change(first, replace_expert(first, name, new(shop, late)), tmp_path / "replaced")
    other = expert(kind, count, name)
    check_same(replaced.folder, built(shop, {**said, "experts": [*experts[:-1], other]}, tmp_path / "wanted").folder)


def test_a_second_full_model_comes_and_goes(shop: Workshop, tmp_path: Path) -> None:
    """Two share their average; beside one the base stays."""
    experts = [expert("adapters", 0), expert("models", 1)]
    first = built(shop, {"base_model": "./base", "experts": experts, "output": {"format": "plain"}}, tmp_path / "first")
    added = write_change(first, add_expert(first, "model2", new(shop, expert("models", 2))), tmp_path / "added")
    assert (first.record.recipe.mixture.backbone, added.record.recipe.mixture.backbone) == ("base", "average")
    removed = write_change(added, remove_expert(added, "model2"), tmp_path / "removed")
    check_same(removed.folder, first.folder)


PLAIN = {"output": {"format": "plain"}}
BY_HAND = {"mixture": {"router": {"fit": "lexical"}}, **PLAIN}


@pytest.mark.parametrize("said", [PLAIN, BY_HAND], ids=["of the rest nothing", "a router"])
def test_a_full_model_joins_those_that_differ_in_ffns(shop: Workshop, tmp_path: Path, said: dict[str, Any]) -> None:
    """What a recipe leaves out means the same for a mixture that is built and for one that is changed."""
    given = {"base_model": "./base", "experts": [expert("ffns", number, f"e{number}") for number in range(2)], **said}
    first = built(shop, given, tmp_path / "first")
    assert first.shape.plain and first.record.carry is None
    late = expert("models", 0)
    added = write_change(first, add_expert(first, late["name"], new(shop, late)), tmp_path / "added")
    assert added.record.carry is not None and added.record.recipe.output.carry == "all"
    check_same(added.folder, built(shop, {**given, "experts": [*given["experts"], late]}, tmp_path / "joint").folder)
    removed = write_change(added, remove_expert(added, late["name"]), tmp_path / "removed")
    assert removed.record.carry is not None  # as its recipe says now
    assert is_proven(verify(open_checkpoint(removed.folder), reload=False))


def test_models_that_are_gone_differed_in_ffns_where_nothing_else_is_carried(shop: Workshop, tmp_path: Path) -> None:
    given = {"base_model": "./base", "experts": [expert("ffns", number, f"e{number}") for number in range(2)], **BY_HAND}
    first = built(shop, given, tmp_path / "first")
    wanted = built(shop, {**given, "experts": [*given["experts"], expert("ffns", 2, "e2")]}, tmp_path / "wanted")
    with gone(shop, "ffn0"):
        added = write_change(first, add_expert(first, "e2", new(shop, expert("ffns", 2))), tmp_path / "added")
        check_same(added.folder, wanted.folder)
        with pytest.raises(SourceError, match="is missing or has changed"):
            write_change(first, add_expert(first, "model0", new(shop, expert("models", 0))), tmp_path / "lacking")
