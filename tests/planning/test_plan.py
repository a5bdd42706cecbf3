"""The plan: what it promises is what the build does, from headers alone and without torch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from conftest import Workshop
from modekit.building.preview import preview_of
from modekit.files.write import safetensors_header
from refusal import without_torch


@pytest.mark.parametrize("mixture", [{"method": "linear"}, {"top_k": 1, "router": {"fit": "random"}}])
def test_the_figures_are_those_of_the_build(workshop: Workshop, mixture: dict[str, Any]) -> None:
    summary = preview_of(workshop.plan(mixture=mixture))
    out = workshop.build(mixture=mixture)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert summary.parameters["total"] == sum(p.numel() for p in model.parameters())
    ffn = 3 * 3 * 32 * 48
    idle = len(workshop.recipe["experts"]) - int(summary.chosen.removeprefix("top_k "))
    assert summary.parameters["active"] == summary.parameters["total"] - idle * ffn
    headers = 0
    for file in out.glob("*.safetensors"):
        headers += 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert summary.bytes["written"] == sum(file.stat().st_size for file in out.glob("*.safetensors")) - headers
    assert summary.shards == len(list(out.glob("*.safetensors")))


def test_statistics_are_planned_to_the_byte(workshop: Workshop) -> None:
    router = {"fit": "logistic", "tokens_per_domain": 600, "sequence_length": 32, "keep_tokens": 100}
    summary = preview_of(workshop.plan(mixture={"router": router}))
    out = workshop.build(mixture={"router": router})
    files = list((out / "router").glob("*.safetensors"))
    data = sum(file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little") for file in files)
    assert summary.bytes["statistics"] == data


def sparse_8b(folder: Path) -> None:
    """A Llama-3-8B folder whose files hold headers and no data on disk."""
    config = LlamaConfig(vocab_size=128_256, intermediate_size=14_336, num_key_value_heads=8, dtype="bfloat16")
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    entries = [(name, "BF16", tuple(each.shape), 2 * each.numel()) for name, each in model.state_dict().items()]
    header = safetensors_header(entries)
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(header)
        stream.truncate(len(header) + sum(entry[3] for entry in entries))
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {}}}')


@pytest.mark.slow
def test_a_plan_of_four_8b_models_needs_no_torch(tmp_path: Path) -> None:
    for name in ("base", "a", "b", "c", "d"):
        sparse_8b(tmp_path / name)
    recipe = {
        "base_model": "./base",
        "experts": [{"name": name, "model": f"./{name}", "prompts": ["x"]} for name in "abcd"],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    summary = json.loads(without_torch("plan", tmp_path / "recipe.yaml", "--json"))
    assert summary["architecture"] == "MixtralForCausalLM"
    assert 24.9e9 < summary["parameters"]["total"] < 25.1e9
    assert summary["parameters"]["active"] < summary["parameters"]["total"] * 0.6
    assert summary["memory"]["load"] == summary["bytes"]["written"]


def test_a_build_without_text_needs_no_torch(workshop: Workshop, tmp_path: Path) -> None:
    experts = [{key: value for key, value in expert.items() if key != "text"} for expert in workshop.recipe["experts"]]
    recipe = workshop.write(experts=experts, mixture={"method": "linear"})
    without_torch("build", recipe, tmp_path / "OUT")
    assert (tmp_path / "OUT" / "modekit.json").is_file()


def test_shards_obey_the_size_and_say_whose_they_are(workshop: Workshop) -> None:
    plan = workshop.plan(output={"shard_size": 40_000})
    assert all(shard.nbytes <= 40_000 or len(shard.tensors) == 1 for shard in plan.shards)
    for shard in plan.shards:
        experts = {tensor.expert for tensor in shard.tensors}
        assert len(experts) == 1
        whose = "backbone" if experts == {None} else f"expert-{1 + min(experts):05d}"
        assert re.fullmatch(rf"model-{whose}-\d{{5}}\.safetensors", shard.file)
    assert len({shard.file for shard in plan.shards}) == len(plan.shards) > 4
    out = workshop.build(output={"shard_size": 40_000})
    assert AutoModelForCausalLM.from_pretrained(out) is not None
