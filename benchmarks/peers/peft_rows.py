"""PEFT's own ways to put adapters together (peft.__version__ stands in the table).

Shape legend: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import peft
import torch
from peft import ArrowConfig, PeftModel, XLoraConfig, get_peft_model
from peft.tuners.lora.arrow import create_arrow_model
from transformers import AutoModelForCausalLM

from peers.choose import choose
from peers.ours import ADAPTERS
from peers.peer import Formula, Made, Peer, Pool
from peers.training import Steps, train

PEFT = f"peft {peft.__version__}"
WEIGHTS = (0.25, 0.5, 1.0)
"""Of each of four adapters: their average, half of their sum, their sum."""
DENSITY = {"ties": 0.2, "dare_ties": 0.5}
"""TIES keeps a fifth (its paper)."""
XLORA_STEPS = Steps(count=60, rate=3e-3)


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


def weighted(way: str, pool: Pool, out: Path) -> Made:
    """One adapter out of all, merged into the base."""

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


def arrow(pool: Pool, _out: Path) -> Made:
    """Routed per token and layer by the adapters' first singular vectors."""
    base = AutoModelForCausalLM.from_pretrained(pool.base, dtype=torch.float32)
    model = create_arrow_model(base, [str(path) for path in pool.experts.values()], ArrowConfig(rng_seed=0)).eval()
    return _adapted(pool, model, "PEFT's defaults: top-3, temperature 1")


def xlora(pool: Pool, _out: Path) -> Made:
    """A classifier of the base's last hidden state scales every adapter."""
    torch.manual_seed(pool.seed)
    base = AutoModelForCausalLM.from_pretrained(pool.base, dtype=torch.float32)
    base.config.use_cache = False
    adapters = {str(place): str(path) for place, path in enumerate(pool.experts.values())}
    said = XLoraConfig(task_type="CAUSAL_LM", hidden_size=base.config.hidden_size, adapters=adapters, layerwise_scalings=True)
    model = get_peft_model(base, said)
    moving = [each for name, each in model.named_parameters() if "internal_xlora_classifier" in name]
    train(pool, lambda ids_BS: model(input_ids=ids_BS).logits, moving, XLORA_STEPS)
    return _adapted(pool, model.eval(), f"classifier alone trained, {XLORA_STEPS.said}; linear, a scaling per token and layer")


def _adapted(pool: Pool, model: torch.nn.Module, note: str) -> Made:
    total = sum(each.numel() for each in model.parameters())
    return Made(Adapted(model), note, total=total, active=total, engines="PEFT")


WAYS = ("linear", "cat", "svd", "ties", "dare_ties")
PEFT_ROWS: list[Peer] = [
    *(Formula(f"PEFT weighted adapter, {way}", partial(weighted, way), PEFT, ADAPTERS) for way in WAYS),
    Formula("PEFT Arrow", arrow, f"2405.11157, {PEFT}", ADAPTERS),
    Formula("PEFT X-LoRA", xlora, f"2402.07148, {PEFT}", ADAPTERS),
]
