"""Experts with a budget: every module low-rank, head and embedding included, against models that are put together here."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from conftest import save, tiny_model, write_text
from modekit.building.build import build
from modekit.building.ranks import chosen
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from modekit.errors import RecipeError
from modekit.loaded.load import load_model
from modekit.loaded.moments import sensitivities
from modekit.planning.budgets import Budget
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe
from modekit.text.sequences import TokenSequence
from modekit.weights.factorise import energies

WHOLE = {"modules": "all", "router": {"fit": "random", "granularity": "sequence", "per": "model"}}
PLACE = {"self_attn.q_proj": 3, "mlp.down_proj": 7}


def experts(budget: float | str | None, **more: Any) -> list[dict[str, Any]]:
    low = {"as": "lora", "budget": budget} if budget is not None else {}
    return [{"name": name, "model": f"./{name}", **low, **more} for name in ("one", "two")]


def models(root: Path, model_type: str = "llama", **overrides: Any) -> dict[str, PreTrainedModel]:
    """Base and two full models in a folder, and what they are without tied weights."""
    made = {}
    for seed, name in enumerate(("base", "one", "two")):
        save(tiny_model(model_type, seed=seed, **overrides), root / name)
        made[name] = untied(AutoModelForCausalLM.from_pretrained(root / name, dtype=torch.float32).eval())
    return made


def untied(model: PreTrainedModel) -> PreTrainedModel:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def mixed(root: Path, said: list[dict[str, Any]], out: str = "out", mixture: dict[str, Any] = WHOLE) -> Checkpoint:
    recipe = parse_recipe({"base_model": "./base", "experts": said, "mixture": mixture, "output": {"format": "modekit"}})
    return build(make_plan(recipe, root), root / out)


def truncated(base: PreTrainedModel, expert: PreTrainedModel, ranks: dict[str, int]) -> PreTrainedModel:
    """The base with the best part of a rank of the expert's difference in every weight; all else is the expert's."""
    made = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            module, own = name.removesuffix(".weight"), expert.get_parameter(name)
            if module in ranks and ranks[module] * sum(own.shape) < own.numel():
                left, singular, right = torch.linalg.svd(own.double() - parameter.double(), full_matrices=False)
                rank = ranks[module]
                parameter.add_((left[:, :rank] * singular[:rank] @ right[:rank]).float())
            else:
                parameter.copy_(own)
    return made


def logits(model: PreTrainedModel, expert: str | None = None) -> torch.Tensor:
    ids = torch.arange(3, 57).reshape(3, 18)
    if expert is not None:
        model.use_expert(expert)
    with torch.inference_mode():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma3_text", "starcoder2", "cohere2"])
def test_a_forced_expert_is_the_base_plus_the_best_parts_of_these_ranks(tmp_path: Path, model_type: str) -> None:
    made = models(tmp_path, model_type, **({"head_dim": 8} if model_type == "gemma3_text" else {}))
    checkpoint = mixed(tmp_path, experts("0.4x"))
    loaded = load_model(checkpoint.folder)
    for expert in checkpoint.record.recipe.experts:
        assert expert.ranks is not None
        assert len(set(expert.ranks.values())) > 1
        wanted = logits(truncated(made["base"], made[expert.name], expert.ranks))
        torch.testing.assert_close(logits(loaded, expert.name), wanted, atol=1e-4, rtol=0)
        assert (wanted - logits(made["base"])).abs().max() > 0.1


def test_with_enough_budget_it_is_the_whole_expert_bit_for_bit(tmp_path: Path) -> None:
    made = models(tmp_path)
    loaded = load_model(mixed(tmp_path, experts("1x")).folder)
    for name in ("one", "two"):
        assert torch.equal(logits(loaded, name), logits(made[name]))


def test_it_takes_no_more_than_its_budget_and_is_proven(tmp_path: Path) -> None:
    made = models(tmp_path)
    said = experts(0.3)
    said[1]["budget"] = 0.15
    checkpoint = mixed(tmp_path, said)
    base = sum(parameter.numel() for parameter in made["base"].parameters())
    for expert, budget in enumerate((0.3, 0.15)):
        ranks = [(place.ranks[expert], name) for name, place in checkpoint.shape.mixture.places.items()]
        taken = sum(rank * sum(made["base"].get_submodule(name).weight.shape) for rank, name in ranks)
        taken += sum(parameter.numel() for name, parameter in made["base"].named_parameters() if parameter.ndim == 1)
        assert 0.9 * budget < taken / base <= budget
    assert is_proven(verify(checkpoint))


def test_a_changed_factor_is_found(tmp_path: Path) -> None:
    models(tmp_path)
    checkpoint = mixed(tmp_path, experts(0.3))
    ref = checkpoint.tensors["lm_head.lora_B"]
    with open(ref.file, "r+b") as file:
        file.seek(ref.start)
        file.write(np.full(64, 0.5, np.float32).tobytes())
    found = {check.name: check for check in verify(open_checkpoint(checkpoint.folder))}
    assert found["computed tensors"].verdict == "failed"
    assert "lm_head" in found["computed tensors"].detail


def test_recorded_ranks_build_the_same_bytes(tmp_path: Path) -> None:
    models(tmp_path)
    first = mixed(tmp_path, experts(0.3), "first")
    again = json.loads((first.folder / "modekit.json").read_text())["recipe"]["experts"]
    assert all(expert["ranks"] for expert in again)
    second = mixed(tmp_path, again, "second")
    assert {file.name: file.read_bytes() for file in first.folder.glob("*.*")} == {
        file.name: file.read_bytes() for file in second.folder.glob("*.*")
    }


def test_parts_of_layers_alone_take_a_budget(tmp_path: Path) -> None:
    made = models(tmp_path)
    checkpoint = mixed(tmp_path, experts(0.2), mixture={"modules": ["q", "mlp"], "router": {"fit": "random"}})
    (ranks,) = [each.ranks for each in checkpoint.record.recipe.experts if each.name == "two"]
    assert ranks is not None
    assert len(ranks) == 3 * 4
    wanted = copy.deepcopy(made["base"])
    part = truncated(made["base"], made["two"], ranks)
    for name in ranks:
        wanted.get_submodule(name).load_state_dict(part.get_submodule(name).state_dict())
    torch.testing.assert_close(logits(load_model(checkpoint.folder), "two"), logits(wanted), atol=1e-4, rtol=0)


def test_text_says_where_a_rank_is_worth_most(tmp_path: Path) -> None:
    """A module whose output the rest of the model ignores gets one rank; without text nobody knows."""
    models(tmp_path)
    for name in ("base", "one", "two"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.zero_()
        model.save_pretrained(tmp_path / name)
    texts = write_text(tmp_path / "text")
    said = [{**each, "text": str(texts["law"])} for each in experts(0.3)]
    up = "model.layers.1.mlp.up_proj"
    ranks = [mixed(tmp_path, each, out).record.recipe.experts[0].ranks for each, out in ((said, "a"), (experts(0.3), "b"))]
    assert [each[up] > 1 for each in ranks if each is not None] == [False, True]


def test_sensitivities_are_what_autograd_says(tmp_path: Path) -> None:
    model = tiny_model()
    texts = [TokenSequence(tuple(range(3, 20)), 1), TokenSequence(tuple(range(30, 41)), 1)]
    name = "model.layers.1.mlp.up_proj"
    found = sensitivities(copy.deepcopy(model), [name, "model.embed_tokens"], texts)
    read = given = 0.0
    for text in texts:
        kept: list[torch.Tensor] = []
        handle = model.get_submodule(name).register_forward_hook(lambda _module, args, y, kept=kept: kept.extend((args[0], y)))
        ids = torch.tensor(text.ids)[None]
        loss = nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
        (gradient,) = torch.autograd.grad(loss, kept[1])
        handle.remove()
        read += float(kept[0].square().mean(-1).sum())
        given += float(gradient.square().mean(-1).sum())
    assert found[name] == pytest.approx(read / 28 * given / 28, rel=1e-4)
    assert found["model.embed_tokens"] > 0


def test_energies_are_squared_singular_values() -> None:
    draw = np.random.default_rng(0)
    small = draw.standard_normal((40, 30)).astype(np.float32)
    np.testing.assert_allclose(energies(small, 12), np.linalg.svd(small)[1][:12] ** 2, rtol=1e-4)
    large = (draw.standard_normal((700, 20)) * np.arange(1, 21)) @ draw.standard_normal((20, 600))
    np.testing.assert_allclose(energies(large.astype(np.float32), 20), np.linalg.svd(large)[1][:20] ** 2, rtol=1e-3)
    assert energies(np.zeros((5, 4), np.float32), 3).tolist() == [0, 0, 0]


def test_the_next_rank_goes_where_it_gains_most_per_parameter() -> None:
    budget = Budget({"a": (10, 10), "b": (10, 90)}, fixed=5, base=1_000)
    worth = {"a": np.array([9.0, 4.0, 1.0, 0.5, 0.1]), "b": np.array([50.0, 15.0, 11.0, 0.0])}
    ranks = chosen(budget, worth, 5 + 20 + 100 + 150)
    assert ranks == {"a": 3, "b": 2}
    assert budget.taken(ranks) == 5 + 3 * 20 + 2 * 100


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "too small for the norms": ({"budget": 0.001}, "expected: 0.0"),
    "more than the expert": ({"budget": "1.25x"}, "0.25x"),
    "no number": ({"budget": "much"}, "like 0.125x"),
    "beside a rank": ({"rank": 4}, "remove one of them"),
    "of a whole model": ({"as": "full"}, "without 'as: lora'"),
    "ranks of other modules": ({"ranks": {"lm_head": 3}}, "first model.embed_tokens"),
    "ranks without it": ({"budget": None, "ranks": {"lm_head": 3}}, "of a 'budget'"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_refused_by_the_plan(tmp_path: Path, case: str) -> None:
    models(tmp_path)
    change, said = BAD[case]
    wrong = [{key: value for key, value in {**each, **change}.items() if value is not None} for each in experts(0.3)]
    with pytest.raises(RecipeError, match=said):
        make_plan(parse_recipe({"base_model": "./base", "experts": wrong, "mixture": WHOLE}), tmp_path)


def test_ranks_beyond_the_budget_are_refused(tmp_path: Path) -> None:
    models(tmp_path)
    first = mixed(tmp_path, experts(0.3)).record.recipe.experts[0].ranks
    with pytest.raises(RecipeError, match="exceed the budget"):
        mixed(tmp_path, experts(0.2, ranks=first), "again")
