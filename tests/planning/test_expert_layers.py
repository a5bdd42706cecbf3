"""`experts[].layers`: an expert has its own parts in some layers alone; in the others it is the base, and nothing is copied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from adapter_folders import train_adapter
from conftest import Workshop, logits_of, make_workshop
from modekit.building.build import build
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.open import open_checkpoint
from modekit.errors import RecipeError, UnsupportedError
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe
from modekit.weights.made import Merged
from rounding import assert_close

pytestmark = pytest.mark.filterwarnings("ignore")

FAMILIES: dict[str, dict[str, Any]] = {"llama": {}, "gemma2": {"head_dim": 8}}
MIXTURE = {"method": "routing", "top_k": 2, "router": {"fit": "random", "seed": 3}}


@pytest.fixture(scope="module", params=FAMILIES)
def shop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Base, experts and an adapter, of two families."""
    made = make_workshop(tmp_path_factory.mktemp(request.param), request.param, **FAMILIES[request.param])
    train_adapter(made.root / "base", LoraConfig(r=2, target_modules=["up_proj"]), made.root / "low")
    return made


def pyramid(*, layers: list[Any] | None = None, **said: Any) -> dict[str, Any]:
    """One expert in every layer, one in the last two, one in the last."""
    experts = [
        {"name": "wide", "model": "./medicine"},
        {"name": "narrow", "model": "./law", "layers": layers or ["1-2"]},
        {"name": "low", "adapter": "./low", "layers": [2]},
    ]
    return {"base_model": "./base", "experts": experts, "mixture": MIXTURE, **said}


def with_layers(root: Path, name: str, layers: list[int]) -> Any:
    """The base with FFNs of another model, or an adapter, in some layers."""
    base = AutoModelForCausalLM.from_pretrained(root / "base").eval()
    inside = [f"model.layers.{layer}." for layer in layers]
    if name == "low":
        base = PeftModel.from_pretrained(base, root / name).eval()
        for key, parameter in base.named_parameters():
            if "lora_B" in key and not any(each in key for each in inside):
                parameter.data.zero_()
        return base
    other = AutoModelForCausalLM.from_pretrained(root / name).state_dict()
    taken = {key: value for key, value in other.items() if any(key.startswith(f"{each}mlp.") for each in inside)}
    base.load_state_dict({**base.state_dict(), **taken})
    return base


def test_a_backbone_has_an_effect_where_experts_lack_layers(shop: Workshop) -> None:
    router = {"fit": "random", "granularity": "sequence", "per": "model"}
    mixture = {"method": "gating", "modules": "all", "backbone": "average", "router": router}
    experts = pyramid()["experts"][:2]
    with pytest.raises(RecipeError, match="backbone has no effect"):
        parse_recipe(pyramid(experts=[experts[0]], mixture=mixture))
    plan = make_plan(parse_recipe(pyramid(experts=[experts[1]], mixture=mixture)), shop.root)
    assert any(isinstance(tensor.inner, Merged) and ".layers.0." in tensor.name for tensor in plan.tensors)


def test_an_expert_is_the_base_where_it_has_no_layer(shop: Workshop, ids: torch.Tensor) -> None:
    """And nothing of it is stored there."""
    out = shop.root / "OUT"
    checkpoint = build(make_plan(parse_recipe(pyramid()), shop.root), out, overwrite=True)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()

    for name, folder, layers in (("wide", "medicine", [0, 1, 2]), ("narrow", "law", [1, 2]), ("low", "low", [2])):
        model.use_expert(name)
        assert_close(logits_of(model, ids), logits_of(with_layers(shop.root, folder, layers), ids))
    gates = [checkpoint.shape.mixture.places[f"model.layers.{layer}.mlp.up_proj"] for layer in range(3)]
    assert [each.own for each in gates] == [[0], [0, 1], [0, 1]]
    assert [each.ranks for each in gates] == [[0, 0, 0], [0, 0, 0], [0, 0, 2]]
    assert is_proven(verify(open_checkpoint(out)))


def test_all_layers_are_what_no_word_of_them_is(shop: Workshop, ids: torch.Tensor) -> None:
    """The same logits; the key itself is the recipe's, and no other recipe says it."""
    folders = []
    for name, said in (("SILENT", {}), ("SAID", {"layers": ["0-2"]})):
        experts = [{"name": name, "model": f"./{name}", **said} for name in ("medicine", "law")]
        recipe = {"base_model": "./base", "experts": experts, "mixture": MIXTURE, "output": {"format": "modekit"}}
        folders.append(build(make_plan(parse_recipe(recipe), shop.root), shop.root / name, overwrite=True).folder)

    assert torch.equal(*(logits_of(folder, ids) for folder in folders))
    assert "layers" not in json.loads((folders[0] / "modekit.json").read_text())["recipe"]["experts"][0]


@pytest.mark.parametrize(
    ("change", "error", "what"),
    [
        ({"layers": [7]}, RecipeError, r"experts\[1\]\.layers"),
        ({"layers": ["two"]}, RecipeError, "must be numbers"),
        ({"output": {"format": "plain"}}, RecipeError, "only some layers"),
    ],
)
def test_what_cannot_be_is_refused(shop: Workshop, change: dict[str, Any], error: type[Exception], what: str) -> None:
    """With the key that says so."""
    with pytest.raises(error, match=what):
        make_plan(parse_recipe(pyramid(**change)), shop.root)


def test_the_base_has_no_layers_and_an_expert_needs_one(shop: Workshop, tmp_path: Path) -> None:
    """Of which something is mixed."""
    base = {"name": "base_too", "model": "base", "layers": [0]}
    with pytest.raises(RecipeError, match="no effect with model: base"):
        parse_recipe({**pyramid(), "experts": [base, *pyramid()["experts"]]})
    said = pyramid()
    said["mixture"] = {**MIXTURE, "layers": [0, 1]}
    with pytest.raises(UnsupportedError, match="nothing of its own that is mixed"):
        make_plan(parse_recipe(said), shop.root)
