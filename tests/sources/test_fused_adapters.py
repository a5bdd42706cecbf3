"""Adapters on the experts and the gate of a base that is itself a mixture: each as PEFT merges it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from adapter_folders import quiet, train_adapter
from conftest import save
from modekit.building.build import build
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.open import open_checkpoint
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe
from tiny_decoders import tiny_decoder

pytestmark = pytest.mark.filterwarnings("ignore")
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"target_modules": "all-linear"},
    "olmoe": {"target_modules": "all-linear", "use_rslora": True},
    "gpt_oss": {
        "target_modules": QKVO,
        "target_parameters": [*EXPERTS, "experts.gate_up_proj_bias", "router.weight"],
        "rank_pattern": {r".*\.gate_up_proj": 5},
        "alpha_pattern": {"down_proj": 3},
    },
    "granitemoe": {"target_modules": ["q_proj", "v_proj"], "target_parameters": [*EXPERTS, "router.weight"]},
    "mixtral": {"target_modules": [*QKVO, "w1", "w2", "w3"], "use_rslora": True},
    "qwen2_moe": {
        "target_modules": QKVO,
        "target_parameters": [*EXPERTS, "gate.weight", "shared_expert.up_proj.weight", "shared_expert_gate.weight"],
    },
    "qwen3_5_moe_text": {"target_modules": ["q_proj", "in_proj_qkv"], "target_parameters": [*EXPERTS, "gate.weight"]},
}
ONE_ROUTER = {"fit": "random", "granularity": "sequence", "per": "model"}
IDS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(5))


def opened(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def merged(root: Path, name: str) -> PreTrainedModel:
    with quiet():
        return PeftModel.from_pretrained(opened(root / "base"), root / name).merge_and_unload()


def adapt(root: Path, model_type: str, **says: Any) -> None:
    """A base and an adapter of it."""
    save(tiny_decoder(model_type), root / "base")
    train_adapter(root / "base", LoraConfig(r=2, lora_alpha=6, **{**FAMILIES[model_type], **says}), root / "lora")


def mixed(root: Path, **says: Any) -> PreTrainedModel:
    experts = [{"name": "plain", "model": "base"}, {"name": "low", "adapter": "./lora"}]
    recipe = parse_recipe({"base_model": "./base", "experts": experts, "mixture": {"router": ONE_ROUTER, **says}})
    build(make_plan(recipe, root), root / "OUT", overwrite=True)
    return opened(root / "OUT")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_adapter_of_a_mixture_is_what_peft_merges(model_type: str, tmp_path: Path) -> None:
    adapt(tmp_path, model_type)
    model, expected = mixed(tmp_path), [logits(opened(tmp_path / "base")), logits(merged(tmp_path, "lora"))]
    assert (expected[0] - expected[1]).abs().max() > 0.1
    for expert, own in enumerate(expected):
        model.use_expert(expert)
        torch.testing.assert_close(logits(model), own, atol=1e-4, rtol=0)
    assert is_proven(verify(open_checkpoint(tmp_path / "OUT")))
