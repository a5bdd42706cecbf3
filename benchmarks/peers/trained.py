"""Peers that train: BTX (arXiv:2403.07816), its router alone, and one dense model on the text of all domains."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from peers.bounds import mean_of, models_of
from peers.mixtral import mixtral, save
from peers.peer import Formula, Made, Peer, Pool
from peers.training import STEPS, Steps, train


def btx(everything: bool, pool: Pool, out: Path) -> Made:
    """FFNs are experts, the rest is averaged, gates start as small random numbers, top-2."""
    torch.manual_seed(pool.seed)
    models = models_of(pool)
    states, config = [model.state_dict() for model in models], models[0].config
    gates = [0.02 * torch.randn(len(states), config.hidden_size) for _ in range(config.num_hidden_layers)]
    model = mixtral(config, mean_of(states), states, gates, 2).train()
    for name, each in model.named_parameters():
        each.requires_grad_(everything or name.endswith("mlp.gate.weight"))
    steps = STEPS if everything else Steps(STEPS.count, 1e-2)
    found = train(pool, lambda ids: model(input_ids=ids, use_cache=False).logits, _moving(model), steps)
    return Made(save(model, out / "model"), f"{steps.said}; loss {found[0]:.2f} to {found[-1]:.2f}")


def _dense(pool: Pool, out: Path) -> Made:
    """The base trained on everything: no fine-tune is used."""
    model = AutoModelForCausalLM.from_pretrained(pool.base, dtype=torch.float32).train()
    found = train(pool, lambda ids: model(input_ids=ids, use_cache=False).logits, _moving(model), STEPS)
    model.save_pretrained(out / "model")
    return Made(out / "model", f"{STEPS.said}; loss {found[0]:.2f} to {found[-1]:.2f}; uses no expert")


def _moving(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [each for each in model.parameters() if each.requires_grad]


TRAINED: list[Peer] = [
    Formula("BTX, all trained", partial(btx, True), "2403.07816, formula"),
    Formula("BTX, router alone trained", partial(btx, False), "after 2403.07816, formula"),
    Formula("one dense model, all text", _dense, "bound, trained as BTX", frozenset({"full"})),
]
