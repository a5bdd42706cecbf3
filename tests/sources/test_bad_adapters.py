"""An adapter that is missing, damaged, foreign or hostile is refused by name, and nothing is left behind.

What each setting of PEFT means is in test_adapters.py; here the command line builds a recipe with such an adapter.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from adapter_folders import PREFIX, UP, lora, write_adapter
from conftest import Workshop, logits_of, save, tiny_model
from damage import change_header
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe
from modekit.sources import lora_settings
from refusal import borrow, refuse_build, run_python, tree

LAW = "experts[1] 'law' (./law)"
RANDOM: dict[str, Any] = {"router": {"fit": "random"}}
FORMATS = ["plain", "modekit"]


Q = lora("self_attn.q_proj", 32, 32)
UP_A, UP_B = f"{PREFIX}1.mlp.up_proj.lora_A.weight", f"{PREFIX}1.mlp.up_proj.lora_B.weight"


@pytest.fixture
def bench(tmp_path: Path, shared_workshop: Workshop) -> Workshop:
    """A recipe over a shared full model and an adapter `law` of this test's own."""
    workshop = borrow(shared_workshop, tmp_path)
    first, second, _ = workshop.recipe["experts"]
    adapter = {key: value for key, value in second.items() if key != "model"} | {"adapter": "./law"}
    workshop.recipe |= {"experts": [first, adapter], "mixture": RANDOM}
    write_adapter(tmp_path / "law")
    return workshop


def law(bench: Workshop) -> Path:
    return bench.root / "law"


def refused(bench: Workshop, *words: str, **changes: Any) -> str:
    """Both formats refuse the recipe with the same words, and name the adapter."""
    messages = [refuse_build(bench, output={"format": form}, **changes) for form in FORMATS]
    for message in messages:
        for word in (LAW, *words):
            assert word in message, message
    return messages[0]


def planned(bench: Workshop, form: str, **changes: Any) -> Any:
    return make_plan(parse_recipe({**bench.recipe, "output": {"format": form}, **changes}), bench.root)


# Folders and files


def test_a_full_model_given_as_an_adapter_and_the_other_way_round(bench: Workshop, shared_workshop: Workshop) -> None:
    bench.recipe["experts"][1]["adapter"] = str(shared_workshop.root / "law")
    message = refuse_build(bench)
    assert "a full model, not an adapter" in message and "model: in place of adapter: in the recipe, or by --model" in message
    bench.recipe["experts"][1] = {"name": "law", "model": "./law"}
    message = refuse_build(bench)
    assert LAW in message
    assert "this is an adapter" in message and "adapter: in place of model: in the recipe, or by --adapter" in message


# What the config and the file say


def test_without_alpha_it_is_the_one_of_peft(bench: Workshop) -> None:
    write_adapter(law(bench), lora_alpha=...)
    plan = planned(bench, "modekit")
    assert plan.config["modekit"]["places"]["model.layers.1.mlp.up_proj"]["scales"] == [1.0, 8 / 4]


def test_layers_that_the_config_leaves_out(bench: Workshop) -> None:
    """PEFT drops their tensors; one that is named in full it takes wherever it lies."""
    three = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "up_proj"]
    for layers, names in (([2, 0, 1], ["up_proj"]), ([], ["up_proj"]), ([2], three), (None, "all-linear")):
        write_adapter(law(bench), layers_to_transform=layers, target_modules=names)
        assert planned(bench, "modekit")
    for layers in (1, [0, 1]):
        write_adapter(law(bench), layers_to_transform=layers)
        refused(bench, "a tensor of the adapter would be lost", f"layers_to_transform: {layers} leaves layer", ".mlp.up_proj.")


def test_patterns_have_one_time_for_all(bench: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(lora_settings, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    one = {f"{PREFIX}0.mlp.up_proj.lora_{side}.weight": UP[f"{PREFIX}0.mlp.up_proj.lora_{side}.weight"] for side in "AB"}
    write_adapter(law(bench), one, alpha_pattern={f"x{number}": 4 for number in range(9)})
    assert planned(bench, "modekit")
    write_adapter(law(bench), one, alpha_pattern={f"x{number}": 4 for number in range(12)})
    refused(bench, "alpha_pattern", "the patterns take too long to match", "x10")


def test_a_pattern_that_would_be_unrolled_without_end(bench: Workshop) -> None:
    write_adapter(law(bench), alpha_pattern={"(" * 40 + "a" + "){2}" * 40: 4})
    refused(bench, "alpha_pattern", "too many repetitions")


# Adapters of another base


@pytest.mark.parametrize("base", ["someone/else", None])
def test_the_name_of_another_base_alone_is_no_mistake(bench: Workshop, base: Any) -> None:
    """Folders are renamed and hub ids copied; the shapes and names of tensors are what has to fit."""
    write_adapter(law(bench), base_model_name_or_path=base)
    for form in FORMATS:
        assert planned(bench, form)


# What is mixed and what is not


def test_adapters_of_what_is_not_mixed(bench: Workshop) -> None:
    write_adapter(law(bench), Q, target_modules=["q_proj"])
    message = refuse_build(bench, output={"format": "plain"})
    assert LAW in message and "changes nothing that this recipe mixes" in message and "q_proj" in message
    for modules in (["k"], ["mlp"], ["o", "down"]):
        message = refuse_build(bench, mixture={**RANDOM, "modules": modules})
        assert LAW in message and "changes nothing that this recipe mixes" in message
    alone = [bench.recipe["experts"][1]]
    assert "no expert differs from the base" in refuse_build(bench, experts=alone, mixture={**RANDOM, "modules": ["k"]})


def test_what_an_adapter_changes_beside_what_is_mixed_is_noted(bench: Workshop) -> None:
    write_adapter(law(bench), {**UP, **Q}, target_modules=["up_proj", "q_proj"])
    for form, mixture in (("plain", RANDOM), ("modekit", {**RANDOM, "modules": ["mlp"]})):
        (note,) = [note for note in planned(bench, form, mixture=mixture).notes if note.startswith("not mixed, and lost")]
        assert "3 of the 6 tensors that law changes (q_proj)" in note and "`modekit verify --deep`" in note
        assert ("mixtral mixes FFNs alone; output: {format: modekit}" in note) == (form == "plain"), note
        assert "mixture.backbone: average" in note


# Routers


def test_routers_of_adapters_refuse_full_models(bench: Workshop) -> None:
    message = refuse_build(bench, mixture={"router": {"fit": "arrow"}})
    assert "router fit 'arrow' scores low-rank changes" in message and "medicine" in message and "as: lora" in message


def test_routers_of_adapters_refuse_what_is_no_low_rank_change(bench: Workshop) -> None:
    magnitudes = {f"{PREFIX}{layer}.mlp.up_proj.lora_magnitude_vector": np.ones(48, np.float32) for layer in range(3)}
    write_adapter(law(bench), {**UP, **magnitudes}, use_dora=True)
    experts = [{"name": "plain", "model": "base"}, bench.recipe["experts"][1]]
    message = refuse_build(bench, experts=experts, mixture={"router": {"fit": "arrow"}})
    assert "no low-rank change" in message and "expert 'law': model.layers.0.mlp.up_proj" in message
    assert "as plain LoRA (without DoRA" in message


# As: lora


def test_as_lora_of_what_is_no_full_model(bench: Workshop) -> None:
    for expert in ({"adapter": "./law"}, {"model": "base"}):
        message = refuse_build(bench, experts=[{"name": "law", "as": "lora", **expert}])
        assert "'as: lora' keeps a low-rank part of a full model, and this is none" in message
    assert "'rank' has no effect" in refuse_build(bench, experts=[{"name": "law", "adapter": "./law", "rank": 2}])


def test_as_lora_in_a_native_architecture(bench: Workshop) -> None:
    experts = [{**bench.recipe["experts"][0], "as": "lora"}, bench.recipe["experts"][1]]
    assert "as: lora" in refuse_build(bench, experts=experts, output={"format": "plain"})


def test_a_rank_larger_than_the_matrix_is_the_whole_difference(bench: Workshop, ids: torch.Tensor) -> None:
    full = bench.recipe["experts"][0]
    results = []
    for changes in ({"as": "lora", "rank": 1000}, {}):
        mixture = {"method": "linear", "modules": ["mlp"]}
        results.append(logits_of(bench.build(experts=[{**full, **changes}], mixture=mixture), ids))
    torch.testing.assert_close(*results, atol=1e-5, rtol=0)


def test_a_difference_that_overflows(bench: Workshop, shared_workshop: Workshop) -> None:
    for name, sign in (("base", 1), ("full", -1)):
        model = tiny_model(seed=1)
        model.model.layers[1].mlp.up_proj.weight.data[0, 0] = sign * 3e38
        save(model, bench.root / name)
    experts = [{"name": "full", "model": "./full", "as": "lora"}]
    message = refuse_build(bench, base_model="./base", experts=experts)
    assert "experts[0] 'full' (./full)" in message and "model.layers.1.mlp.up_proj.weight" in message


# Values


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("key", [UP_A, UP_B])
def test_nan_and_inf(bench: Workshop, key: str, value: float) -> None:
    tensors = {name: tensor.copy() for name, tensor in UP.items()}
    tensors[key].flat[-1] = value
    write_adapter(law(bench), tensors)
    refused(bench, "NaN or Inf", key)


def test_values_that_overflow_the_result(bench: Workshop) -> None:
    tensors = {**UP, UP_B: np.full_like(UP[UP_B], 1e5)}
    write_adapter(law(bench), tensors)
    message = refuse_build(bench, output={"dtype": "float16", "format": "plain"})
    assert LAW in message and "do not fit float16" in message
    message = refuse_build(bench, output={"dtype": "float16", "format": "modekit"})
    assert LAW in message and "do not fit float16" in message and UP_B in message
    write_adapter(law(bench), {**UP, UP_A: np.full_like(UP[UP_A], 1e30), UP_B: np.full_like(UP[UP_B], 1e30)})
    message = refuse_build(bench, output={"format": "plain"})
    assert LAW in message and "do not fit float32" in message


# In a process of its own

COMMAND = "import sys; from modekit.cli import main; sys.argv = ['modekit', *sys.argv[1:]]; main()"


@pytest.mark.parametrize("key", ["\ud800", "\x1b[31mred", "\u202ered"], ids=["surrogate", "escape", "direction"])
def test_names_that_no_terminal_can_show(bench: Workshop, key: str) -> None:
    change_header(law(bench) / "adapter_model.safetensors", lambda header: header.update({key: header.pop(UP_A)}))
    recipe = bench.write()
    before = tree(bench.root)
    run = run_python(COMMAND, "build", recipe, bench.root / "OUT")
    assert (run.returncode, run.stdout) == (2, ""), run.stderr
    assert run.stderr.startswith("error: ") and "Traceback" not in run.stderr
    assert LAW in run.stderr and "to do: " in run.stderr
    assert "\x1b" not in run.stderr
    assert tree(bench.root) == before
