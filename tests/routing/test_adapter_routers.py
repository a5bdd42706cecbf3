"""Routers of adapters: Arrow against its definition, and refits from it and to it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from adapter_folders import train_adapter
from conftest import Workshop
from modekit.architecture.modekit_router import select
from modekit.building.verify import is_proven, verify
from modekit.checkpoint.open import open_checkpoint
from modekit.loaded.load import load_model
from refusal import refuse

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

TARGETS = {"medicine": ["q_proj", "v_proj", "up_proj"], "law": ["q_proj", "k_proj", "gate_proj", "up_proj", "down_proj"]}
RANKS = {"medicine": 3, "law": 5}
HIDDEN = 32


@pytest.fixture
def bench(workshop: Workshop) -> Workshop:
    """The base and two adapters of different ranks and targets."""
    experts = []
    for name, targets in TARGETS.items():
        config = peft.LoraConfig(r=RANKS[name], lora_alpha=2 * RANKS[name], target_modules=targets, task_type="CAUSAL_LM")
        train_adapter(workshop.root / "base", config, workshop.root / f"{name}-lora")
        experts.append({"name": name, "adapter": f"./{name}-lora", "text": f"./text/{name}.jsonl"})
    experts.append({"name": "general", "model": "base", "text": "./text/code.jsonl"})
    workshop.recipe["experts"] = experts
    return workshop


def changes(bench: Workshop, name: str, modules: tuple[str, ...], layer: int = 0) -> torch.Tensor:
    """Scale B A of all `modules` that an adapter changes, one below the other, from its own file."""
    tensors = load_file(bench.root / f"{name}-lora" / "adapter_model.safetensors")
    parts = []
    for module in modules:
        key = f"base_model.model.model.layers.{layer}.{module}"
        if f"{key}.lora_A.weight" in tensors:
            parts.append(2.0 * tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"])
    return torch.cat(parts)


def expected_scores(change: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What the paper says, on the whole product: no factorisation shared with the code."""
    return (x @ torch.linalg.svd(change.double(), full_matrices=False)[2][0].float()).abs()


@pytest.mark.parametrize(
    ("per", "place", "modules"),
    [
        ("layer", "self_attn.q_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("projection", "mlp.up_proj", ("mlp.up_proj",)),
    ],
)
def test_a_router_without_data_scores_what_the_adapters_make_of_x(
    bench: Workshop, per: str, place: str, modules: tuple[str, ...]
) -> None:
    out = bench.build(mixture={"method": "routing", "top_k": 2, "router": {"fit": "arrow", "temperature": 0.5, "per": per}})
    model = load_model(out)
    router = model.get_submodule(f"model.layers.0.{place}").router
    x = torch.randn(2, 7, HIDDEN, generator=torch.Generator().manual_seed(0))
    scores = torch.stack([expected_scores(changes(bench, name, modules), x) for name in TARGETS], dim=-1)
    scores = torch.cat([scores, torch.zeros(2, 7, 1)], dim=-1) / 0.5  # the base changes nothing
    torch.testing.assert_close(router.logits(x), scores, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(router(x), select(scores, {"method": "routing", "top_k": 2}), rtol=1e-4, atol=1e-4)
    assert open_checkpoint(out).record.router.status == "fitted"
    assert is_proven(verify(open_checkpoint(out)))


def test_whole_modules_are_refused_before_a_byte_is_copied(bench: Workshop) -> None:
    config = peft.LoraConfig(target_modules=["k_proj", "down_proj"], use_dora=True, task_type="CAUSAL_LM")
    train_adapter(bench.root / "base", config, bench.root / "dora")
    bench.recipe["experts"][0]["adapter"] = "./dora"
    bench.write(mixture={"router": {"fit": "arrow"}})
    assert "no low-rank change" in refuse("plan", bench.root / "recipe.yaml")


def test_a_context_of_scores_is_the_average_of_the_scores(bench: Workshop) -> None:
    mixture = {"router": {"fit": "arrow", "granularity": "context", "decay": [1.0]}}
    router = load_model(bench.build(mixture=mixture)).get_submodule("model.layers.0.mlp.gate_proj").router
    x = torch.randn(1, 5, HIDDEN, generator=torch.Generator().manual_seed(0))
    token = torch.stack([expected_scores(changes(bench, n, ("mlp.gate_proj", "mlp.up_proj")), x) for n in TARGETS], -1)
    mean = token.cumsum(1) / torch.arange(1, 6)[:, None]
    torch.testing.assert_close(router.logits(x)[..., :2], mean, rtol=1e-4, atol=1e-4)


def test_a_mixture_of_given_scores_opens_without_its_text(bench: Workshop, tmp_path: Path) -> None:
    for expert in bench.recipe["experts"]:
        expert.pop("text")
    out = bench.build(mixture={"router": {"fit": "arrow"}})
    ids = torch.randint(3, 90, (1, 12))
    assert torch.isfinite(AutoModelForCausalLM.from_pretrained(out)(input_ids=ids).logits).all()
