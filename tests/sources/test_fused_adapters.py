"""Adapters on the experts and the gate of a base that is itself a mixture: each as PEFT merges it."""

from __future__ import annotations

import copy
import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from adapter_folders import export_adapter, quiet, train_adapter
from conftest import save
from modekit.building.build import build
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.open import open_checkpoint
from modekit.errors import MismatchError, UnsupportedError
from modekit.loaded.experts import load_expert, load_own_model
from modekit.planning.make import make_plan
from modekit.planning.tensors import PlannedTensor
from modekit.recipes.read import parse_recipe
from modekit.sources.adapted import Adapted, wrapped
from modekit.sources.adapter import LowRank
from modekit.sources.contents import OpenFiles, read_header
from modekit.sources.header import TensorRef
from modekit.sources.rows import stacked
from modekit.weights.made import Fold
from modekit.weights.reading import WeightReader
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
PLAIN_AND_LOW = [{"name": "plain", "model": "base"}, {"name": "low", "adapter": "./lora"}]
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


def mixed(root: Path, experts: list[dict[str, str]] = PLAIN_AND_LOW, **says: Any) -> PreTrainedModel:
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
    named = torch.tensor([1, 0])  # an expert for each sequence, by which every token goes the way of several
    model.use_expert(named)
    expected = torch.stack([expected[expert][row] for row, expert in enumerate(named)])
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=0)
    assert not any(place["own"] for place in model.config.modekit["places"].values())
    assert is_proven(verify(open_checkpoint(tmp_path / "OUT")))


@pytest.mark.parametrize("model_type", ["gpt_oss", "qwen2_moe"])
def test_copies_of_one_adapter_are_that_adapter(model_type: str, tmp_path: Path) -> None:
    """Whatever the router says: the modekit mixture's weights sum to one over the same model."""
    adapt(tmp_path, model_type)
    shutil.copytree(tmp_path / "lora", tmp_path / "twin")
    experts = [{"name": name, "adapter": f"./{name}"} for name in ("lora", "twin")]
    model = mixed(tmp_path, experts, method="gating", router={"fit": "random"})
    torch.testing.assert_close(logits(model), logits(merged(tmp_path, "lora")), atol=1e-4, rtol=0)


def test_adapters_and_a_whole_model_of_one_mixture(tmp_path: Path) -> None:
    """One whole, two low-rank with other ranks and other parameters, the base; saved and opened again."""
    adapt(tmp_path, "qwen3_moe")
    save(tiny_decoder("qwen3_moe", 1), tmp_path / "other")
    says = {"r": 3, "target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"], "use_rslora": True}
    train_adapter(tmp_path / "base", LoraConfig(**says), tmp_path / "down")
    names = ("lora", "down")
    experts = [
        {"name": "plain", "model": "base"},
        {"name": "other", "model": "./other"},
        *({"name": name, "adapter": f"./{name}"} for name in names),
    ]
    model = mixed(tmp_path, experts, modules=["mlp", "q", "k", "v", "o"])
    for expert, name in enumerate(names, 2):
        model.use_expert(expert)
        torch.testing.assert_close(logits(model), logits(merged(tmp_path, name)), atol=1e-4, rtol=0)
    model.use_expert(None)
    with quiet():
        copy.deepcopy(model).save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(opened(tmp_path / "again")), logits(model), atol=1e-5, rtol=0)


def test_experts_that_an_adapter_keeps_whole_are_mixed_beside_what_it_adapts(tmp_path: Path) -> None:
    adapt(tmp_path, "qwen3_moe", target_modules=["q_proj"], modules_to_save=["experts"])
    model = mixed(tmp_path)
    model.use_expert(1)
    expected = logits(merged(tmp_path, "lora"))
    assert (expected - logits(opened(tmp_path / "base"))).abs().max() > 0.1
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_an_adapter_leaves_the_mixture_as_it_came(model_type: str, tmp_path: Path) -> None:
    adapt(tmp_path, model_type)
    mixed(tmp_path)
    export_adapter(open_checkpoint(tmp_path / "OUT"), "low", tmp_path / "back")
    given, back = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lora", "back"))
    assert given.keys() == back.keys() and all(torch.equal(given[name], back[name]) for name in given)
    torch.testing.assert_close(logits(merged(tmp_path, "back")), logits(merged(tmp_path, "lora")), atol=1e-5, rtol=0)


def adapted(name: str, *shape: int) -> Adapted:
    return Adapted(f"mlp.experts.{name}", shape, name)


def parts(experts: int, rank: int, inputs: int, outputs: int) -> dict[str, TensorRef]:
    shapes = {"lora_A.weight": (experts * rank, inputs), "lora_B.weight": (outputs, rank * experts)}
    return {part: TensorRef(part, Path("a"), "F32", shape, 0, 0) for part, shape in shapes.items()}


def test_shapes_say_which_parameter_a_wrapper_is_for_and_peft_s_order_where_they_do_not() -> None:
    up, down, alike = adapted("up_proj", 4, 48, 32), adapted("down_proj", 4, 32, 48), adapted("other_proj", 4, 48, 32)
    outer, inner = "mlp.experts", "mlp.experts.base_layer"
    of_up, of_down = parts(4, 2, 32, 48), parts(4, 2, 48, 32)
    for found, weights in (({outer: of_down, inner: of_up}, [up, down]), ({outer: of_up, inner: of_down}, [up, down])):
        meant = wrapped(found, weights, "law")
        assert {module: weight.fits(found[module]) for module, weight in meant.items()} == {outer: True, inner: True}
    assert wrapped({outer: of_up, inner: of_up}, [up, alike], "law") == {inner: up, outer: alike}
    with pytest.raises(UnsupportedError, match=r"cannot be told[^§]*mlp\.experts\.up_proj or mlp\.experts\.other_proj"):
        wrapped({outer: of_up}, [up, alike], "law")


def test_an_adapter_of_more_experts_is_refused_and_not_taken_for_one_of_a_larger_rank(tmp_path: Path) -> None:
    says = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}
    adapt(tmp_path, "qwen3_moe", **says)
    save(tiny_decoder("qwen3_moe", num_local_experts=2), tmp_path / "base")
    with pytest.raises(MismatchError, match=r"does not fit[^§]*lora_[^§]*found: +\[8, 48\][^§]*\[4, 48\]"):
        mixed(tmp_path)


def test_verify_runs_an_adapter_of_a_mixture_in_peft(tmp_path: Path) -> None:
    adapt(tmp_path, "qwen3_moe")
    mixed(tmp_path)
    model, made_by = load_own_model(open_checkpoint(tmp_path / "OUT"), 1)
    assert made_by == "PEFT"
    torch.testing.assert_close(logits(load_expert(tmp_path / "base", tmp_path / "lora")), logits(model), atol=1e-4, rtol=0)


def single_experts(root: Path) -> dict[str, torch.Tensor]:
    """An adapter of two experts of one layer as transformers 4 had them."""
    return {
        f"base_model.model.model.layers.0.mlp.experts.{expert}.{part}_proj.lora_{side}.weight": torch.randn(shape) * 0.2
        for expert in range(4)
        for part, rows, columns in (("gate", 48, 32), ("up", 48, 32), ("down", 32, 48))
        for side, shape in (("A", (2, columns)), ("B", (rows, 2)))
    }


def test_an_adapter_of_single_experts_is_mixed_once_peft_has_joined_it(tmp_path: Path) -> None:
    """What the message says to do is enough."""
    adapt(tmp_path, "qwen3_moe")
    folder = tmp_path / "lora"
    save_file(single_experts(tmp_path), folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["gate_proj", "up_proj", "down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**said, "task_type": "CAUSAL_LM"}))
    with pytest.raises(MismatchError, match=r"lacks[^§]*experts\.0\.[^§]*let PEFT join it"):
        mixed(tmp_path)
    with quiet():
        adapted = PeftModel.from_pretrained(opened(tmp_path / "base"), folder)
        adapted.save_pretrained(tmp_path / "joined")
    shutil.rmtree(folder)
    (tmp_path / "joined").rename(folder)
    model = mixed(tmp_path)
    model.use_expert(1)
    torch.testing.assert_close(logits(model), logits(adapted.merge_and_unload()), atol=1e-4, rtol=0)


def test_fused_experts_are_folded_without_a_copy_of_the_whole(tmp_path: Path) -> None:
    """Many tensors of a file that are one of the class, 134 MB of it, go through a build in blocks."""
    experts, rows, columns = 64, 1024, 1024
    whole = torch.randn(8, rows, columns).bfloat16().repeat(experts // 8, 1, 1)
    save_file({f"{expert}.weight": whole[expert].contiguous() for expert in range(experts)}, tmp_path / "base.safetensors")
    sides = {"A": torch.randn(experts * 4, columns) * 0.01, "B": torch.randn(rows, 4 * experts) * 0.01}
    save_file(sides, tmp_path / "lora.safetensors")
    base, lora = (read_header(tmp_path / f"{name}.safetensors", where=name) for name in ("base", "lora"))
    fused = stacked("experts", [base[f"{expert}.weight"] for expert in range(experts)])
    made = Fold(fused, LowRank(lora["A"], lora["B"], 0.5, experts=experts))
    planned, found = PlannedTensor("experts", "BF16", fused.shape, "expert", made), bytearray()
    with OpenFiles() as opened:
        reading = WeightReader(opened, [])
        tracemalloc.start()
        peak = 0
        for number, block in enumerate(planned.blocks(reading)):
            found += block if number == 5 else b""
            peak = max(peak, tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peak < fused.nbytes / 2
    first = 5 * len(found) // 2 // rows // columns
    delta = torch.einsum("ore,eri->eoi", sides["B"].view(rows, 4, experts), sides["A"].view(experts, 4, columns)) * 0.5
    expected = (whole.float() + delta)[first : first + len(found) // 2 // rows // columns].bfloat16()
    torch.testing.assert_close(
        torch.frombuffer(found, dtype=torch.bfloat16).view(expected.shape), expected, atol=1e-3, rtol=8e-3
    )
