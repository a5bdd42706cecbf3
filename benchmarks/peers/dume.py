"""DUME (arXiv:2603.29765): FFN experts on the average of the rest, gates by ridge regression of the domain on hidden states.

W = (X'X + lambda I)^-1 X'Y per layer, Y the one-hot domain; columns of norm 1, divided by a temperature. Hidden states are read
at the router, with the domain's own expert on, which closes more than the states of another model (router_fits.md).
Temperature and top_k are chosen on the select split.

Shape legend: T tokens, D hidden, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from modekit.text.sequences import make_batches
from peers.bounds import mean_of, models_of
from peers.choose import choose
from peers.mixtral import mixtral, save
from peers.peer import Formula, Made, Peer, Pool
from peers.score import texts_of

FIT_TOKENS = 6_000
"""Per domain."""
RIDGE = 0.01
"""lambda over the mean of the diagonal of X'X."""
CHOICES = tuple(product((0.1, 0.3), (1, 2)))
"""Temperature and top_k."""


def ridge(gram_DD: torch.Tensor, sums_DE: torch.Tensor) -> torch.Tensor:
    """W (E, D), rows of norm 1."""
    shrink = RIDGE * gram_DD.diagonal().mean() * torch.eye(len(gram_DD), dtype=gram_DD.dtype)
    return torch.nn.functional.normalize(torch.linalg.solve(gram_DD + shrink, sums_DE).T, dim=1)


def gates_of(pool: Pool, backbone: dict[str, torch.Tensor], states: Sequence[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """A layer's gate (E, D) each; every domain counts the same."""
    model = AutoModelForCausalLM.from_pretrained(pool.base, dtype=torch.float32).eval()
    layers, width = model.model.layers, model.config.hidden_size
    grams = [torch.zeros(width, width, dtype=torch.float64) for _ in layers]
    sums = [torch.zeros(width, len(states), dtype=torch.float64) for _ in layers]
    mask = torch.zeros(0, dtype=torch.bool)

    def read(place: int, domain: int, _module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        x_TD = inputs[0][mask].double()
        grams[place] += x_TD.T @ x_TD / tokens
        sums[place][:, domain] += x_TD.sum(0) / tokens

    for domain, sequences in enumerate(texts_of(pool.base, pool.text, FIT_TOKENS).values()):
        tokens = sum(each.size for each in sequences)
        model.load_state_dict({name: (states[domain] if ".mlp." in name else backbone)[name] for name in backbone})
        hooks = [layer.mlp.register_forward_pre_hook(partial(read, place, domain)) for place, layer in enumerate(layers)]
        with torch.inference_mode():
            for batch in make_batches(sequences, tokens=4_096):
                mask = batch.mask.bool()
                model(input_ids=batch.input_ids, attention_mask=batch.mask.long(), use_cache=False)
        for hook in hooks:
            hook.remove()
    return [ridge(gram_DD, sums_DE).float() for gram_DD, sums_DE in zip(grams, sums, strict=True)]


def dume(pool: Pool, out: Path) -> Made:
    """A native checkpoint."""
    models = models_of(pool)
    states = [model.state_dict() for model in models]
    backbone = mean_of(states)
    gates = gates_of(pool, backbone, states)

    def of(choice: tuple[float, int]) -> Made:
        temperature, top_k = choice
        made = mixtral(models[0].config, backbone, states, [gate / temperature for gate in gates], top_k)
        return Made(save(made, out / f"{temperature}-{top_k}"))

    (temperature, top_k), made = choose(pool, CHOICES, of)
    return Made(made.model, f"temperature {temperature}, top-{top_k} of {len(CHOICES)} by select")


DUME: list[Peer] = [Formula("DUME", dume, "2603.29765, formula")]
