"""PEFT's own ways to put adapters together (peft.__version__ stands in the table), and LoraHub's search by its formula.

Shape legend: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import peft
import torch
from peft import ArrowConfig, PeftModel, XLoraConfig, get_peft_model
from peft.tuners.lora.arrow import create_arrow_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from modekit.text.sequences import encode
from peers.choose import choose
from peers.ours import ADAPTERS
from peers.peer import Formula, Made, Peer, Pool
from peers.pool import read_text
from peers.score import score
from peers.training import Steps, train

PEFT = f"peft {peft.__version__}"
WEIGHTS = (0.25, 0.5, 1.0)
"""Of each of four adapters: their average, half of their sum, their sum."""
DENSITY = {"ties": 0.2, "dare_ties": 0.5}
"""TIES keeps a fifth (its paper)."""
SHOTS, SEARCHED, BOUND, PENALTY = 5, 40, 1.5, 0.05
"""LoraHub: examples per domain, models that are tried, largest weight, weight of the mean of absolute weights (its code)."""


@dataclass(frozen=True)
class Adapted:
    """A model of PEFT's that is no checkpoint."""

    model: torch.nn.Module

    def logits(self, ids_BS: torch.Tensor) -> torch.Tensor:
        """Its own."""
        return self.model(input_ids=ids_BS).logits


def loaded(pool: Pool) -> PeftModel:
    """The base with all adapters under their names."""
    (first, path), *others = pool.experts.items()
    base = AutoModelForCausalLM.from_pretrained(pool.base, dtype=torch.float32)
    base.config.use_cache = False
    model = PeftModel.from_pretrained(base, str(path), adapter_name=first)
    for name, other in others:
        model.load_adapter(str(other), adapter_name=name)
    return model.eval()


def _weighted(way: str, pool: Pool, out: Path) -> Made:
    def of(weight: float) -> Made:
        torch.manual_seed(pool.seed)
        model = loaded(pool)
        density = {"density": DENSITY[way]} if way in DENSITY else {}
        model.add_weighted_adapter(list(pool.experts), [weight] * len(pool.experts), "all", combination_type=way, **density)
        model.set_adapter("all")
        model.merge_and_unload().save_pretrained(out / f"{weight}")
        return Made(out / f"{weight}")

    weight, made = choose(pool, WEIGHTS, of)
    shown = f", density {DENSITY[way]}" if way in DENSITY else ""
    return Made(made.model, f"weight {weight} of {WEIGHTS} by select{shown}")


def _arrow(pool: Pool, _out: Path) -> Made:
    base = AutoModelForCausalLM.from_pretrained(pool.base, dtype=torch.float32)
    model = create_arrow_model(base, [str(path) for path in pool.experts.values()], ArrowConfig(rng_seed=0)).eval()
    return _adapted(pool, model, "PEFT's defaults: top-3, temperature 1")


def _xlora(pool: Pool, _out: Path) -> Made:
    torch.manual_seed(pool.seed)
    base = AutoModelForCausalLM.from_pretrained(pool.base, dtype=torch.float32)
    base.config.use_cache = False
    adapters = {str(place): str(path) for place, path in enumerate(pool.experts.values())}
    said = XLoraConfig(task_type="CAUSAL_LM", hidden_size=base.config.hidden_size, adapters=adapters, layerwise_scalings=True)
    model = get_peft_model(base, said)
    moving = [each for name, each in model.named_parameters() if "internal_xlora_classifier" in name]
    steps = Steps(count=100, rate=3e-3)
    train(pool, lambda ids_BS: model(input_ids=ids_BS).logits, moving, steps)
    return _adapted(pool, model.eval(), f"classifier alone trained, {steps.said}; linear, a scaling per token and layer")


def _adapted(pool: Pool, model: torch.nn.Module, note: str) -> Made:
    total = sum(each.numel() for each in model.parameters())
    return Made(Adapted(model), note, total=total, active=total, engines="PEFT")


def combined(factors: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    """LoraHub: A and B are each a weighted sum, so that their product has cross terms."""
    return sum(weight * each for weight, each in zip(weights, factors, strict=True))


def _lorahub(pool: Pool, out: Path) -> Made:
    """Weights of adapters by a search without gradients over a few examples."""
    draw, tokenizer, model = random.Random(pool.seed), AutoTokenizer.from_pretrained(pool.base), loaded(pool)
    shots = [text for path in pool.text.values() for text in draw.sample(read_text(path), SHOTS)]
    sequences = encode(tokenizer, shots, max_tokens=2**20, sequence_length=256)
    names = list(pool.experts)
    model.add_weighted_adapter(names, [1.0] * len(names), "all", combination_type="linear")
    model.set_adapter("all")

    def tried(weights: list[float]) -> float:
        for module in model.modules():
            if hasattr(module, "lora_A") and "all" in module.lora_A:
                for factors in (module.lora_A, module.lora_B):
                    factors["all"].weight.data = combined([factors[name].weight.data for name in names], weights)
                module.scaling["all"] = module.scaling[names[0]]
        return score(model.base_model.model, sequences)[0] + PENALTY * sum(map(abs, weights)) / len(weights)

    best, width = [0.0] * len(names), 0.5
    lowest = tried(best)
    for _ in range(SEARCHED):
        point = [max(-BOUND, min(BOUND, weight + draw.gauss(0, width))) for weight in best]
        found = tried(point)
        width *= 1.5 if found < lowest else 0.9
        best, lowest = (point, found) if found < lowest else (best, lowest)
    tried(best)
    model.merge_and_unload().save_pretrained(out / "merged")
    shown = ", ".join(f"{weight:.2f}" for weight in best)
    return Made(out / "merged", f"weights {shown} after {SEARCHED} trials of a (1+1) search, {SHOTS} examples a domain")


WAYS = ("linear", "cat", "svd", "ties", "dare_ties")
PEFT_ROWS: list[Peer] = [
    *(Formula(f"PEFT weighted adapter, {way}", partial(_weighted, way), PEFT, ADAPTERS) for way in WAYS),
    Formula("PEFT Arrow", _arrow, f"2405.11157, {PEFT}", ADAPTERS),
    Formula("PEFT X-LoRA", _xlora, f"2402.07148, {PEFT}", ADAPTERS),
    Formula("LoraHub search", _lorahub, "2307.13269, formula", ADAPTERS),
]
