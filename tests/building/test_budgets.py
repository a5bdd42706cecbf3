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
from modekit.building.parts import chosen, options_of
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from modekit.cli.shell import main
from modekit.engines.adapters import chosen_adapters
from modekit.errors import RecipeError, UnsupportedError
from modekit.evaluation.inspection.inspect import inspect
from modekit.loaded.load import load_model
from modekit.loaded.moments import sensitivities
from modekit.members.change import write_change
from modekit.members.edits import NewExpert, add_expert, remove_expert
from modekit.members.listing import members_of
from modekit.planning.budgets import Part
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe
from modekit.text.sequences import TokenSequence
from modekit.weights.factorise import energies
from modekit.weights.few_bits import codes_of, decoded, squared_error, steps_of

WHOLE = {"modules": "all", "router": {"fit": "random", "granularity": "sequence", "per": "model"}}
MIXED = {"q_proj": "rank 3", "down_proj": "2 bits", "lm_head": "3 bits", "embed_tokens": "1 bits", "v_proj": "whole"}
"""Last name of a module -> what is kept of it; of all others rank 5."""


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


def parts_of(base: PreTrainedModel, kept: dict[str, str] = MIXED) -> dict[str, str]:
    """A part for every matrix of a model."""
    matrices = [name.removesuffix(".weight") for name, parameter in base.named_parameters() if parameter.ndim == 2]
    return {name: kept.get(name.rpartition(".")[2], "rank 5") for name in matrices}


def kept_of(base: PreTrainedModel, expert: PreTrainedModel, parts: dict[str, str]) -> PreTrainedModel:
    """The base with these parts of the expert's differences; all else is the expert's."""
    made = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            part, own = parts.get(name.removesuffix(".weight"), "whole"), expert.get_parameter(name)
            number = 0 if part == "whole" else int(part.replace("rank ", "").partition(" ")[0])
            delta = own - parameter
            if part == "whole":
                parameter.copy_(own)
            elif part.startswith("rank"):
                left, singular, right = torch.linalg.svd(delta.double(), full_matrices=False)
                parameter.add_((left[:, :number] * singular[:number] @ right[:number]).float())
            else:
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
def test_a_forced_expert_is_the_base_plus_its_parts(tmp_path: Path, model_type: str) -> None:
    made = models(tmp_path, model_type, **({"head_dim": 8} if model_type == "gemma3_text" else {}))
    said = experts(1.0, parts=parts_of(made["base"]))
    said[1] |= {"parts": parts_of(made["base"], {"o_proj": "4 bits", "embed_tokens": "rank 7"})}
    checkpoint = mixed(tmp_path, said)
    loaded = load_model(checkpoint.folder)
    for expert in said:
        wanted = logits(kept_of(made["base"], made[expert["name"]], expert["parts"]))
        torch.testing.assert_close(logits(loaded, expert["name"]), wanted, atol=1e-4, rtol=0)
        assert (wanted - logits(made["base"])).abs().max() > 0.1
    assert is_proven(verify(checkpoint))


@pytest.mark.parametrize("top_k", [1, 2])
def test_routed_tokens_get_what_their_experts_say(tmp_path: Path, top_k: int) -> None:
    """With all parts whole, of few bits or of low rank: the weighted sum of what the experts say at a place."""
    made = models(tmp_path)
    parts = parts_of(made["base"])
    mixture = {"modules": ["q", "mlp"], "top_k": top_k, "router": {"fit": "random"}}
    low = {
        name: part for name, part in parts.items() if name.rpartition(".")[2] in ("q_proj", "gate_proj", "up_proj", "down_proj")
    }
    checkpoint = mixed(tmp_path, experts(1.0, parts=low), mixture=mixture)
    loaded = load_model(checkpoint.folder)
    place = loaded.get_submodule("model.layers.1.mlp.down_proj")
    x, weights = torch.randn(2, 5, 48), torch.rand(2, 5, 2)
    weights = torch.where(weights == weights.max(-1, keepdim=True)[0], weights, 0) if top_k == 1 else weights
    weights = weights / weights.sum(-1, keepdim=True)
    place.leader.weights = weights
    said = [kept_of(made["base"], made[name], low).get_submodule("model.layers.1.mlp.down_proj")(x) for name in ("one", "two")]
    wanted = sum(weights[..., expert, None] * y for expert, y in enumerate(said))
    torch.testing.assert_close(place(x), wanted, atol=1e-4, rtol=0)


def test_with_enough_budget_it_is_the_whole_expert_bit_for_bit(tmp_path: Path) -> None:
    made = models(tmp_path)
    loaded = load_model(mixed(tmp_path, experts("1x")).folder)
    for name in ("one", "two"):
        assert torch.equal(logits(loaded, name), logits(made[name]))


@pytest.mark.parametrize("dtype", ["source", "bfloat16"])
def test_it_takes_no_more_than_its_budget_and_is_proven(tmp_path: Path, dtype: str) -> None:
    models(tmp_path)
    said = experts(0.3)
    said[1]["budget"] = 0.12
    recipe = {"base_model": "./base", "experts": said, "mixture": WHOLE, "output": {"format": "modekit", "dtype": dtype}}
    plan = make_plan(parse_recipe(recipe), tmp_path)
    checkpoint = build(plan, tmp_path / "out")
    base = sum(ref.nbytes for name, ref in checkpoint.tensors.items() if ".base." in name)
    base += sum(ref.nbytes for name, ref in checkpoint.tensors.items() if "norm" in name and ".experts.0." in name)
    for place, budget in enumerate((0.3, 0.12)):
        assert 0.85 * budget < members_of(checkpoint)[place].nbytes / base <= budget
    assert len(set((checkpoint.record.recipe.experts[1].parts or {}).values())) > 1
    assert is_proven(verify(checkpoint))
    assert sum(tensor.nbytes for tensor in plan.tensors) <= 1.5 * base


def test_a_changed_factor_is_found(tmp_path: Path) -> None:
    models(tmp_path)
    checkpoint = mixed(tmp_path, experts(0.1))
    ref = checkpoint.tensors["lm_head.differences.0.codes"]
    with ref.file.open("r+b") as file:
        file.seek(ref.start)
        file.write(bytes(64))
    found = {check.name: check for check in verify(open_checkpoint(checkpoint.folder))}
    assert found["computed tensors"].verdict == "failed"
    assert "lm_head" in found["computed tensors"].detail


def test_recorded_parts_build_the_same_bytes(tmp_path: Path) -> None:
    models(tmp_path)
    first = mixed(tmp_path, experts(0.3), "first")
    again = json.loads((first.folder / "modekit.json").read_text())["recipe"]["experts"]
    assert all(expert["parts"] for expert in again)
    second = mixed(tmp_path, again, "second")
    assert {file.name: file.read_bytes() for file in first.folder.glob("*.*")} == {
        file.name: file.read_bytes() for file in second.folder.glob("*.*")
    }


def test_text_says_where_bytes_are_worth_most(tmp_path: Path) -> None:
    """A module whose output the rest of the model ignores gets the least; without text nobody knows."""
    models(tmp_path)
    for name in ("base", "one", "two"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.zero_()
        model.save_pretrained(tmp_path / name)
    texts = write_text(tmp_path / "text")
    said = [{**each, "text": str(texts["law"])} for each in experts(0.3)]
    up = "model.layers.1.mlp.up_proj"
    parts = [mixed(tmp_path, each, out).record.recipe.experts[0].parts for each, out in ((said, "a"), (experts(0.3), "b"))]
    assert [each[up] == "rank 1" for each in parts if each is not None] == [True, False]


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


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_few_bits_err_as_little_as_they_can(bits: int) -> None:
    """Of a normal distribution as much as Max (1960) found; codes and steps give back what was measured."""
    rows = np.random.default_rng(0).standard_normal((64, 1_003)).astype(np.float32)
    rows[3] = 0
    steps = steps_of(rows, bits)
    again = decoded(codes_of(rows, steps, bits), steps, 1_003)
    error = float(np.square(rows - again, dtype=np.float64).sum())
    assert error == pytest.approx(squared_error(rows, bits), rel=1e-5)
    best = {1: 0.3634, 2: 0.1188, 3: 0.03744, 4: 0.01154, 8: 1.2e-4}[bits]
    assert error / np.square(rows).sum() < 1.02 * best
    assert not again[3].any()
    if bits == 1:
        np.testing.assert_allclose(np.abs(again), np.abs(rows).mean(1, keepdims=True).repeat(1_003, 1), rtol=1e-5)


def test_a_difference_of_low_rank_is_kept_by_its_rank_and_another_in_bits() -> None:
    draw = np.random.default_rng(0)
    low = (draw.standard_normal((64, 2)) @ draw.standard_normal((2, 80))).astype(np.float32)
    flat = draw.standard_normal((64, 80)).astype(np.float32)
    options = {"low": options_of(low, 4), "flat": options_of(flat, 4)}
    for found in options.values():
        prices, errors = [price for price, _, _ in found], [error for _, error, _ in found]
        assert prices == sorted(set(prices))
        assert errors == sorted(set(errors), reverse=True)
    kept = chosen(options, 4 * 2 * (64 + 80) + 64 * (4 + 2 * 10))
    assert kept == {"low": Part(rank=2), "flat": Part(bits=2)}
    assert chosen(options, 2 * 4 * 64 * 80) == {"low": Part(rank=2), "flat": Part()}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "too small for the norms": ({"budget": 0.001}, "expected: 0.0"),
    "more than the expert": ({"budget": "1.25x"}, "0.25x"),
    "no number": ({"budget": "much"}, "like 0.125x"),
    "beside a rank": ({"rank": 4}, "remove one of them"),
    "of a whole model": ({"as": "full"}, "without 'as: lora'"),
    "parts of other modules": ({"parts": {"lm_head": "rank 3"}}, "first model.embed_tokens"),
    "parts without it": ({"budget": None, "parts": {"lm_head": "rank 3"}}, "of a 'budget'"),
    "a part of another kind": ({"parts": {"lm_head": "9 bits"}}, "parts"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_refused_by_the_plan(tmp_path: Path, case: str) -> None:
    models(tmp_path)
    change, said = BAD[case]
    wrong = [{key: value for key, value in {**each, **change}.items() if value is not None} for each in experts(0.3)]
    with pytest.raises(RecipeError, match=said):
        make_plan(parse_recipe({"base_model": "./base", "experts": wrong, "mixture": WHOLE}), tmp_path)


def test_parts_beyond_the_budget_are_refused(tmp_path: Path) -> None:
    parts = parts_of(models(tmp_path)["base"])
    with pytest.raises(RecipeError, match="exceed the budget"):
        mixed(tmp_path, experts(0.1, parts=parts))


def test_who_comes_and_goes_leaves_the_parts_of_the_others(tmp_path: Path) -> None:
    """Added is built with it, removed is built without, byte for byte; the new one's parts are chosen then."""
    models(tmp_path)
    save(tiny_model(seed=3), tmp_path / "three")
    three = {"model": "./three", "as": "lora", "budget": 0.15}
    both = mixed(tmp_path, experts(0.15))
    added = write_change(both, add_expert(both, "three", NewExpert(three, tmp_path)), tmp_path / "added")
    kept = added.record.recipe.experts
    assert [each.parts for each in kept[:2]] == [each.parts for each in both.record.recipe.experts]
    assert kept[2].parts
    as_built = mixed(tmp_path, [*experts(0.15), {"name": "three", **three}], "built")
    for file in sorted(as_built.folder.glob("*.safetensors")):
        assert (added.folder / file.name).read_bytes() == file.read_bytes(), file.name
    removed = write_change(added, remove_expert(added, "one"), tmp_path / "removed")
    without = mixed(tmp_path, [experts(0.15)[1], {"name": "three", **three}], "without")
    for file in sorted(without.folder.glob("*.safetensors")):
        assert (removed.folder / file.name).read_bytes() == file.read_bytes(), file.name
    assert is_proven(verify(removed))


def test_the_commands_take_a_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a build with it; what takes an expert's place brings a budget of its own, or none."""
    models(tmp_path)
    save(tiny_model(seed=3), tmp_path / "three")
    both = mixed(tmp_path, experts(0.15))
    low = ("--as", "lora", "--budget", "0.15x")

    def run(*command: str, out: str) -> Checkpoint:
        given = ("modekit", *command, "--no-measure", "--out", str(tmp_path / out))
        monkeypatch.setattr("sys.argv", list(given))
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code in (0, None)
        return open_checkpoint(tmp_path / out)

    added = run("add", str(both.folder), "--name", "three", "--model", str(tmp_path / "three"), *low, out="added")
    as_built = mixed(tmp_path, [*experts(0.15), {"name": "three", "model": "./three", "as": "lora", "budget": 0.15}], "built")
    for file in sorted(as_built.folder.glob("*.safetensors")):
        assert (added.folder / file.name).read_bytes() == file.read_bytes(), file.name
    other = run("replace", str(both.folder), "two", "--model", str(tmp_path / "three"), *low, out="other")
    assert other.record.recipe.experts[1].parts == as_built.record.recipe.experts[2].parts
    whole = run("replace", str(both.folder), "two", "--model", str(tmp_path / "three"), out="whole")
    assert whole.record.recipe.experts[1].budget is None and whole.record.recipe.experts[1].parts is None


def test_inspect_and_the_list_say_what_is_kept(tmp_path: Path) -> None:
    made = models(tmp_path)
    texts = write_text(tmp_path / "text")
    parts = parts_of(made["base"])
    said = experts(1.0, parts=parts)
    said = [{**each, "text": str(texts[domain])} for each, domain in zip(said, ("law", "code"), strict=True)]
    checkpoint = mixed(tmp_path, said, mixture={"modules": "all", "router": {"fit": "ngram", "buckets": 64}})
    found = inspect(checkpoint, tokens_per_domain=300, write=False)
    assert "one: 1x of the base: embed_tokens 1 bits (1); q_proj rank 3 (3); k_proj rank 5 (3)" in "\n".join(found.notes)
    assert members_of(checkpoint)[0].kind == "1x of a model"
    changes = []
    for name in ("one", "two"):
        kept = kept_of(made["base"], made[name], parts).named_parameters()
        changes.append(torch.cat([(own - made["base"].get_parameter(key)).flatten() for key, own in kept]))
    wanted = float(torch.nn.functional.cosine_similarity(*changes, dim=0))
    assert found.similarity is not None
    assert found.similarity.experts[0][1] == pytest.approx(wanted, abs=1e-4)


def test_codes_stay_codes_in_another_dtype_and_are_no_adapter(tmp_path: Path) -> None:
    made = models(tmp_path)
    checkpoint = mixed(tmp_path, experts(1.0, parts=parts_of(made["base"])))
    rounded = load_model(checkpoint.folder, dtype=torch.bfloat16)
    codes = rounded.get_submodule("lm_head").differences[0].codes
    assert codes.dtype == torch.uint8
    wanted = logits(load_model(checkpoint.folder), "one")
    assert (logits(rounded, "one").float() - wanted).abs().max() < 0.05 * wanted.abs().max()
    for ending in (adapters_of, without_vllm):
        assert "few bits" in ending(checkpoint)


def adapters_of(checkpoint: Checkpoint) -> str:
    with pytest.raises(UnsupportedError) as refused:
        chosen_adapters(checkpoint, None)
    return str(refused.value)


def without_vllm(checkpoint: Checkpoint) -> str:
    places = {name: place for name, place in checkpoint.shape.mixture.places.items() if name != "lm_head"}
    return checkpoint.shape.mixture.model_copy(update={"places": places}).without_vllm or ""
