"""What a plan says of models and settings that would otherwise be wrong in silence, and that it is made once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import modekit
from adapter_folders import lora, write_adapter
from conftest import Workshop, make_workshop
from modekit.planning.make import make_plan
from modekit.planning.modekit import ModekitForm
from modekit.planning.native import NativeForm
from modekit.recipes.read import parse_recipe

pytestmark = pytest.mark.usefixtures("short_tables")


def said(shop: Workshop, part: str, **changes: Any) -> list[str]:
    return [note for note in shop.plan(**changes).notes if part in note]


RANDOM = {"router": {"fit": "random"}}


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    return make_workshop(tmp_path)


@pytest.mark.parametrize("form", ["plain", "modekit"])
def test_a_build_plans_its_tensors_once(shop: Workshop, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    calls: list[str] = []
    for kind in (NativeForm, ModekitForm):
        made = kind.experts
        monkeypatch.setattr(kind, "experts", lambda form, made=made: calls.append(type(form).__name__) or made(form))
    open_router = {"top_k": 1}
    modekit.build(shop.write(mixture=open_router, output={"format": form}), shop.root / "OUT")
    assert len(calls) == 1


@pytest.mark.parametrize("backbone", ["base", "average"])
def test_what_is_not_carried_of_attention_is_named(tmp_path: Path, backbone: str) -> None:
    shop = make_workshop(tmp_path, "qwen2", hidden_size=128)
    mixture = {"method": "routing", "top_k": 1, "router": {"fit": "lexical"}, "backbone": backbone}
    (note,) = said(shop, "what experts change of", mixture=mixture, output={"format": "plain", "carry": "all"})
    assert "(not of self_attn.k_proj.bias, self_attn.q_proj.bias, self_attn.v_proj.bias, which all share)" in note


def test_a_rank_for_nothing_that_is_carried_is_named(tmp_path: Path) -> None:
    shop, mixture = make_workshop(tmp_path, hidden_size=128), {"method": "routing", "top_k": 1, "router": {"fit": "lexical"}}
    for more, count in (({"modules": ["mlp"]}, 1), ({}, 0)):
        output = {"format": "plain", "rank": 32}
        assert len(said(shop, "output.rank has no effect", mixture={**mixture, **more}, output=output)) == count


def test_an_adapter_of_another_base_is_named(shop: Workshop) -> None:
    folder = shop.root / "law-lora"
    write_adapter(folder, lora("mlp.up_proj", 48, 32, layers=1, seed=1))
    expert = {"name": "law", "adapter": "./law-lora"}
    config = json.loads((folder / "adapter_config.json").read_text())
    for name, count in (
        ("org/Other-Instruct", 1),
        ("somewhere/base", 0),
        ("unsloth/Base-unsloth-bnb-4bit", 0),
        ("org/base-AWQ", 0),
        ("", 0),
    ):
        (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": name}))
        found = said(shop, "names the base", experts=[expert, {"name": "plain", "model": "base"}], mixture=RANDOM)
        assert len(found) == count and all("Other-Instruct" in note for note in found)


def test_a_recipe_without_text_says_that_experts_can_write_it(shop: Workshop) -> None:
    both = {"base_model": "./base", "experts": [{"name": name, "model": f"./{name}"} for name in ("law", "code")]}
    for more in ({}, {"mixture": {"router": {"fit": "random", "seed": 7}}}):
        recipe = parse_recipe({**both, **more})
        assert sum("`text: self`" in note for note in make_plan(recipe, shop.root).notes) == 1
    for file in (shop.root / "base").glob("token*"):
        file.unlink()
    assert not any("`text: self`" in note for note in make_plan(parse_recipe(both), shop.root).notes)


def test_settings_without_effect_in_the_chosen_form_are_named(shop: Workshop) -> None:
    for name in ("law", "code"):
        write_adapter(shop.root / f"{name}-lora", lora("mlp.up_proj", 48, 32, layers=1, seed=1))
    experts = [{"name": name, "adapter": f"./{name}-lora", "text": f"./text/{name}.jsonl"} for name in ("law", "code")]
    mixture = {"router": {"fit": "lexical"}}
    notes = said(shop, "has no effect", experts=experts, mixture=mixture, output={"rank": 32})
    assert [note.partition(" ")[0] for note in notes] == ["output.rank"]
