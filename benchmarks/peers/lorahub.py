"""LoraHub (arXiv:2307.13269): weights of adapters by a search without gradients over a few examples of all domains.

The paper searches with an evolution strategy of the package nevergrad; here with the simplest one, of as many trials.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from transformers import AutoTokenizer

from modekit.text.sequences import encode
from peers.ours import ADAPTERS
from peers.peer import Formula, Made, Peer, Pool
from peers.peft_rows import loaded
from peers.pool import read_text
from peers.score import score

SHOTS, SEARCHED, BOUND, PENALTY = 5, 40, 1.5, 0.05
"""Examples per domain, models that are tried, largest weight, weight of the mean of absolute weights (as in its code)."""


def combined(factors: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    """LoraHub: A and B are each a weighted sum, so that their product has cross terms."""
    return sum(weight * each for weight, each in zip(weights, factors, strict=True))


def lorahub(pool: Pool, out: Path) -> Made:
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


LORAHUB: list[Peer] = [Formula("LoraHub search", lorahub, "2307.13269, formula", ADAPTERS)]
