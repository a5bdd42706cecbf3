"""The form of a result that a recipe leaves open, from headers and samples: which is planned, what is said, and for whom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapter_folders import lora, write_adapter
from conftest import Workshop, make_workshop
from modekit.building.preview import memory_of
from modekit.planning import choice
from modekit.planning.changes import changes
from modekit.planning.make import make_plan
from modekit.planning.plan import Plan
from modekit.planning.room import bytes_to_carry
from modekit.recipes.read import parse_recipe
from modekit.sources.families import family_of
from modekit.sources.source import open_source
from modekit.weights import flat


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    shop = make_workshop(tmp_path_factory.mktemp("form"), num_hidden_layers=1)
    for seed, name in enumerate(("fever", "court")):
        write_adapter(shop.root / name, lora("self_attn.q_proj", 32, 32, layers=1, seed=seed))
    for seed, name in enumerate(("cough", "oath")):
        write_adapter(shop.root / name, lora("mlp.up_proj", 48, 32, layers=1, seed=seed))
    changed = {
        "ffn": "mlp.up_proj.weight",
        "attention": "self_attn.o_proj.weight",
        "rows": "embed_tokens.weight",
        "nothing": "",
    }
    for name, part in changed.items():
        tensors = load_file(shop.root / "base" / "model.safetensors")
        for key, tensor in tensors.items():
            if part and key.endswith(part):
                tensor.view(-1)[len(tensor.view(-1)) // 2 + 5] += 1
        (shop.root / name).mkdir()
        for file in (shop.root / "base").iterdir():
            if file.suffix != ".safetensors":
                (shop.root / name / file.name).write_bytes(file.read_bytes())
        save_file(tensors, shop.root / name / "model.safetensors", metadata={"format": "pt"})
    return shop


def expert(name: str) -> dict[str, Any]:
    what = "adapter" if name in ("fever", "court", "cough", "oath") else "model"
    return {"name": name, what: "base" if name == "base_too" else f"./{name}", "text": "./text/law.jsonl"}


def planned(shop: Workshop, *names: str, **said: Any) -> Plan:
    recipe = {"base_model": "./base", "experts": [expert(name) for name in names], **said}
    return make_plan(parse_recipe(recipe), shop.root)


@pytest.mark.parametrize("numbers", [2**13, 4])
def test_what_a_model_changes_is_seen_wherever_a_sample_looks(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch, numbers: int
) -> None:
    monkeypatch.setattr(flat, "_NUMBERS", numbers)
    monkeypatch.setattr(flat, "_PIECES", 8)
    base = open_source("base_model", "base", shop.root / "base")
    family = family_of(base.config, where="base")
    expected = {"ffn": "ffn", "attention": "more", "rows": "more", "law": "more", "nothing": "nothing"}
    for name, change in expected.items():
        assert changes(base, open_source(name, name, shop.root / name), family) == change, name


def test_of_a_fine_tune_pieces_alone_are_read(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """It differs everywhere."""
    base, law = (open_source(name, name, shop.root / name) for name in ("base", "law"))
    monkeypatch.setattr("modekit.planning.changes.same_bytes", lambda *_: pytest.fail("a whole tensor was read"))
    assert changes(base, law, family_of(law.config, where="law")) == "more"


def test_adapters_that_all_fit_are_planned_plain_with_both_sizes(shop: Workshop) -> None:
    plan = planned(shop, "fever", "court")
    other = planned(shop, "fever", "court", output={"format": "modekit"})
    assert plan.shape.plain and plan.otherwise is None and plan.recipe.output.format == "plain" and plan.recipe.top_k == 1
    assert not other.shape.plain and "in the modekit architecture)" in plan.why
    assert planned(shop, "fever", "court", mixture={"router": {"fit": "lexical"}}).shape.plain


def test_a_plain_checkpoint_that_is_large_and_many_times_the_others_size_is_not_taken(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the recipe alone: free disk and memory are not asked for."""
    plain = planned(shop, "cough", "oath")
    assert plain.shape.plain
    monkeypatch.setattr(choice, "LARGE", plain.bytes_written - 1)
    assert planned(shop, "cough", "oath").shape.plain  # but not so many times the other form's
    monkeypatch.setattr(choice, "MANY_TIMES", 0.0)
    plan = planned(shop, "cough", "oath")
    assert not plan.shape.plain and plan.recipe.output.format == "modekit"
    assert "a plain checkpoint would take" in plan.why and "format: plain in a recipe, builds it anyway" in plan.why
    assert planned(shop, "cough", "oath", output={"format": "plain"}).shape.plain
    monkeypatch.setattr(choice, "LARGE", plain.bytes_written)
    assert planned(shop, "cough", "oath").shape.plain


def test_memory_is_that_of_one_layer(shop: Workshop, tmp_path: Path) -> None:
    """Beside a sample of what layers read, embedding and head, and, where an expert is measured, logits of a text."""
    deep = make_workshop(tmp_path, num_hidden_layers=3)
    experts = [{"name": name, "model": f"./{name}", "text": "./text/law.jsonl"} for name in ("law", "code")]
    recipe = {"base_model": "./base", "experts": experts, "output": {"format": "plain", "carry": "all"}}
    one, three = (make_plan(parse_recipe(recipe), each.root) for each in (shop, deep))
    sample = 2 * 1_024 * 4 * (32 + 32)  # numbers of hidden state and attention's output in a layer
    assert bytes_to_carry(three) - bytes_to_carry(one) == pytest.approx(2 * sample, rel=0.2)
    base = load_file(shop.root / "base" / "model.safetensors")
    assert memory_of(one)["build"] > bytes_to_carry(one) > sum(4 * tensor.numel() for tensor in base.values()) + 4 * 512 * 97
    assert bytes_to_carry(planned(shop, "fever", "court")) <= bytes_to_carry(one) and not bytes_to_carry(
        planned(shop, "ffn", "base_too")
    )


def test_full_models_are_measured_unless_the_recipe_says_what_becomes_of_them(shop: Workshop) -> None:
    plan = planned(shop, "law", "fever")
    assert plan.shape.plain and plan.otherwise is not None and plan.otherwise.recipe.mixture.modules == "all"
    assert plan.recipe.mixture.backbone == "base" and "if the build finds that it keeps 95%" in plan.why
    several = planned(shop, "law", "code", "base_too")
    assert several.recipe.mixture.backbone == "average" and several.recipe.output.carry == "all"
    for said in (
        {"output": {"format": "plain"}},
        {"output": {"carry": "ffn"}},
        {"output": {"format": "modekit"}},
        {"mixture": {"modules": "all"}},
        {"mixture": {"router": {"fit": "random"}}},
    ):
        assert planned(shop, "law", "code", **said).otherwise is None, said
    alone = planned(shop, "ffn", "base_too")
    assert not any("and lost on this backbone" in note for note in alone.notes)
    said = {"mixture": {"router": {"fit": "lexical"}}, "output": {"format": "plain", "carry": "ffn"}}
    (lost,) = (note for note in planned(shop, "law", "ffn", **said).notes if "and lost on this backbone" in note)
    assert "what law changed outside" in lost and "output: {carry: all} carries the rest" in lost
    assert alone.shape.plain and alone.otherwise is None and alone.recipe.output.carry is None


def test_what_is_settled_stays_so(shop: Workshop) -> None:
    for names in (("fever", "court"), ("law", "code", "base_too"), ("law", "fever"), ("ffn", "base_too")):
        plan = planned(shop, *names)
        again = make_plan(plan.recipe, shop.root)
        assert again.recipe == plan.recipe and again.tensors == plan.tensors and again.otherwise is None


def test_numbers_of_other_kinds_differ(tmp_path: Path) -> None:
    """A model that was saved in another dtype is looked at as another one."""
    shop = make_workshop(tmp_path, num_hidden_layers=1)
    file = shop.root / "base" / "model.safetensors"
    halves = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(file).items()}
    save_file(halves, shop.root / "law" / "model.safetensors", metadata={"format": "pt"})
    base, law = (open_source(name, name, shop.root / name) for name in ("base", "law"))
    assert changes(base, law, family_of(base.config, where="base")) == "more"
