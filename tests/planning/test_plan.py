"""The plan: what it promises is what the build does, from headers alone and without torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM

from conftest import Workshop
from modekit.building.preview import preview_of
from modekit.files.write import safetensors_header
from modekit.planning.make import make_plan
from modekit.recipes.read import load_recipe


def plan_of(workshop: Workshop, **changes: Any) -> Any:
    return make_plan(load_recipe(workshop.write(**changes)), workshop.root)


@pytest.mark.parametrize("mixture", [{"method": "linear"}, {"top_k": 1, "router": {"fit": "random"}}])
def test_the_figures_are_those_of_the_build(workshop: Workshop, mixture: dict[str, Any]) -> None:
    summary = preview_of(plan_of(workshop, mixture=mixture))
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
    summary = preview_of(plan_of(workshop, mixture={"router": router}))
    out = workshop.build(mixture={"router": router})
    files = list((out / "router").glob("*.safetensors"))
    data = sum(file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little") for file in files)
    assert summary.bytes["statistics"] == data


LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": False,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}


def sparse_8b(folder: Path) -> None:
    """A Llama-3-8B folder whose files hold headers and no data on disk."""
    folder.mkdir()
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (128_256, 4096),
        "lm_head.weight": (128_256, 4096),
        "model.norm.weight": (4096,),
    }
    for layer in range(32):
        p = f"model.layers.{layer}."
        shapes |= {p + f"mlp.{name}_proj.weight": (14_336, 4096) for name in ("gate", "up")}
        shapes |= {p + "mlp.down_proj.weight": (4096, 14_336), p + "input_layernorm.weight": (4096,)}
        shapes |= {p + f"self_attn.{name}_proj.weight": (4096, 4096) for name in ("q", "o")}
        shapes |= {p + f"self_attn.{name}_proj.weight": (1024, 4096) for name in ("k", "v")}
        shapes |= {p + "post_attention_layernorm.weight": (4096,)}
    entries = []
    for name, shape in shapes.items():
        size = 2
        for length in shape:
            size *= length
        entries.append((name, "BF16", shape, size))
    header = safetensors_header(entries)
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(header)
        stream.truncate(len(header) + sum(entry[3] for entry in entries))
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {}}}')


def test_a_plan_of_four_8b_models_needs_no_torch(tmp_path: Path) -> None:
    for name in ("base", "a", "b", "c", "d"):
        sparse_8b(tmp_path / name)
    recipe = {
        "base_model": "./base",
        "experts": [{"name": name, "model": f"./{name}", "prompts": ["x"]} for name in "abcd"],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    script = (
        "import sys; from modekit.cli.shell import main\n"
        f"sys.argv = ['modekit', 'plan', {str(tmp_path / 'recipe.yaml')!r}, '--json']\n"
        "try: main()\nfinally: assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    summary = json.loads(done.stdout)
    assert summary["architecture"] == "MixtralForCausalLM"
    assert 24.9e9 < summary["parameters"]["total"] < 25.1e9
    assert summary["parameters"]["active"] < summary["parameters"]["total"] * 0.6
    assert summary["memory"]["load"] == summary["bytes"]["written"]


def test_shards_obey_the_size_and_say_whose_they_are(workshop: Workshop) -> None:
    plan = plan_of(workshop, output={"shard_size": 40_000})
    assert all(shard.nbytes <= 40_000 or len(shard.tensors) == 1 for shard in plan.shards)
    for shard in plan.shards:
        experts = {tensor.expert for tensor in shard.tensors}
        assert len(experts) == 1
        whose = "backbone" if experts == {None} else f"expert-{1 + min(experts):05d}"
        assert re.fullmatch(rf"model-{whose}-\d{{5}}\.safetensors", shard.file)
    assert len({shard.file for shard in plan.shards}) == len(plan.shards) > 4
    out = workshop.build(output={"shard_size": 40_000})
    assert AutoModelForCausalLM.from_pretrained(out) is not None
