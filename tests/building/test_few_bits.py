"""Experts kept in a few bits per number, against models that are put together here."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from conftest import save, tiny_model, write_text
from modekit.building.build import build
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.errors import RecipeError
from modekit.loaded.load import load_model
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe
from modekit.weights.factorise import codes_of, steps_of

WHOLE = {"modules": "all", "router": {"fit": "random", "granularity": "sequence", "per": "model"}}


def experts(bits: int = 2, **more: Any) -> list[dict[str, Any]]:
    return [{"name": name, "model": f"./{name}", "bits": bits, **more} for name in ("one", "two")]


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


def mixed(root: Path, said: list[dict[str, Any]], mixture: dict[str, Any] = WHOLE) -> Checkpoint:
    recipe = parse_recipe({"base_model": "./base", "experts": said, "mixture": mixture, "output": {"format": "modekit"}})
    return build(make_plan(recipe, root), root / "out")


def kept_of(base: PreTrainedModel, expert: PreTrainedModel, number: int, only: tuple[str, ...] = ("",)) -> PreTrainedModel:
    """The base with the expert's differences of matrices in so many bits; all else is the expert's."""
    made = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            own = expert.get_parameter(name)
            if not any(each in name for each in only):
                continue
            if parameter.ndim != 2:
                parameter.copy_(own)
                continue
            delta = own - parameter
            step = torch.from_numpy(steps_of(delta.numpy(), number))[:, None]
            codes = ((delta / step).nan_to_num().floor() + 2 ** (number - 1)).clamp(0, 2**number - 1)
            parameter.add_((codes - (2**number - 1) / 2) * step)
    return made


def logits(model: PreTrainedModel, expert: str | None = None) -> torch.Tensor:
    ids = torch.arange(3, 57).reshape(3, 18)
    if expert is not None:
        model.use_expert(expert)
    with torch.inference_mode():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma3_text", "starcoder2", "cohere2"])
def test_a_forced_expert_is_the_base_plus_its_difference(tmp_path: Path, model_type: str) -> None:
    made = models(tmp_path, model_type, **({"head_dim": 8} if model_type == "gemma3_text" else {}))
    said = experts()
    said[1]["bits"] = 3
    checkpoint = mixed(tmp_path, said)
    loaded = load_model(checkpoint.folder)
    for expert in said:
        wanted = logits(kept_of(made["base"], made[expert["name"]], expert["bits"]))
        torch.testing.assert_close(logits(loaded, expert["name"]), wanted, atol=1e-4, rtol=0)
        assert (wanted - logits(made["base"])).abs().max() > 0.1
    assert is_proven(verify(checkpoint))


@pytest.mark.parametrize("mixture", [{}, {"router": {"fit": "lexical"}}], ids=["left out", "lexical"])
def test_all_that_a_model_changes_is_kept_where_the_recipe_names_no_modules(
    tmp_path: Path, short_tables: None, mixture: dict[str, Any]
) -> None:
    made, texts = models(tmp_path, num_hidden_layers=1), write_text(tmp_path / "text")
    said = [{**experts(8)[0], "text": str(texts["law"])}, {"name": "general", "model": "base", "text": str(texts["code"])}]
    recipe = parse_recipe({"base_model": "./base", "experts": said, "mixture": mixture})
    plan = make_plan(recipe, tmp_path)
    assert not any("lost" in note for note in plan.notes)
    loaded = load_model(build(plan, tmp_path / "out").folder)
    torch.testing.assert_close(logits(loaded, "one"), logits(kept_of(made["base"], made["one"], 8)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("top_k", [1, 2])
def test_routed_tokens_get_what_their_experts_say(tmp_path: Path, top_k: int) -> None:
    """The weighted sum of what the experts say at a place."""
    made = models(tmp_path)
    mixture = {"modules": ["q", "mlp"], "top_k": top_k, "router": {"fit": "random"}}
    loaded = load_model(mixed(tmp_path, experts(), mixture=mixture).folder)
    name = "model.layers.1.mlp.down_proj"
    place = loaded.get_submodule(name)
    x, weights = torch.randn(2, 5, 48), torch.rand(2, 5, 2)
    weights = torch.where(weights == weights.max(-1, keepdim=True)[0], weights, 0) if top_k == 1 else weights
    weights = weights / weights.sum(-1, keepdim=True)
    place.leader.weights = weights
    said = [kept_of(made["base"], made[each], 2, (name,)).get_submodule(name)(x) for each in ("one", "two")]
    wanted = sum(weights[..., expert, None] * y for expert, y in enumerate(said))
    torch.testing.assert_close(place(x), wanted, atol=1e-4, rtol=0)


def test_two_bits_take_a_sixteenth_of_a_model(tmp_path: Path) -> None:
    models(tmp_path, hidden_size=128, intermediate_size=256)
    checkpoint = mixed(tmp_path, experts())
    base = sum(ref.nbytes for name, ref in checkpoint.tensors.items() if ".base." in name)
    kept = [
        sum(ref.nbytes for name, ref in checkpoint.tensors.items() if f".differences.{number}." in name) for number in (0, 1)
    ]
    assert all(0 < each < 0.09 * base for each in kept)


def test_a_plan_calls_them_what_they_are(tmp_path: Path) -> None:
    models(tmp_path)
    recipe = {"base_model": "./base", "experts": experts(), "mixture": {"router": {"fit": "random"}}}
    why = make_plan(parse_recipe(recipe), tmp_path).why
    assert "a few bits per number (one, two)" in why and "low-rank" not in why


def decoded(codes_XPC: npt.NDArray[np.uint8], step_X: npt.NDArray[np.float32], inputs: int) -> npt.NDArray[np.float32]:
    """The rows (X, I) that codes and steps stand for."""
    bits = codes_XPC.shape[1]
    planes = np.unpackbits(codes_XPC, axis=2, count=inputs, bitorder="little")
    codes_XI = sum(planes[:, plane].astype(np.float32) * np.float32(2**plane) for plane in range(bits))
    return np.asarray((codes_XI - np.float32((2**bits - 1) / 2)) * step_X[:, None], np.float32)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_few_bits_err_as_little_as_they_can(bits: int) -> None:
    """Of a normal distribution as much as Max (1960) found."""
    rows = np.random.default_rng(0).standard_normal((64, 1_003)).astype(np.float32)
    rows[3] = 0
    steps = steps_of(rows, bits)
    again = decoded(codes_of(rows, steps, bits), steps, 1_003)
    error = float(np.square(rows - again, dtype=np.float64).sum())
    best = {1: 0.3634, 2: 0.1188, 3: 0.03744, 4: 0.01154, 8: 1.2e-4}[bits]
    assert error / np.square(rows).sum() < 1.02 * best
    assert not again[3].any()
    if bits == 1:
        np.testing.assert_allclose(np.abs(again), np.abs(rows).mean(1, keepdims=True).repeat(1_003, 1), rtol=1e-5)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "beside a rank": ({"as": "lora", "rank": 4}, "without 'as: lora'"),
    "of an adapter": ({"model": None, "adapter": "./one"}, "of a full model"),
    "of the base": ({"model": "base"}, "of a full model"),
    "too many": ({"bits": 9}, "less than or equal to 8"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_refused(case: str) -> None:
    change, said = WRONG[case]
    wrong = [{key: value for key, value in {**each, **change}.items() if value is not None} for each in experts()]
    with pytest.raises(RecipeError, match=said):
        parse_recipe({"base_model": "./base", "experts": wrong, "mixture": WHOLE})
