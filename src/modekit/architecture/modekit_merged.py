"""One expert made of all: the experts' weights averaged with the router's (SMEAR, arXiv:2306.03745; Lory, arXiv:2405.03133).

    y = E(x; sum_e g_e theta_e)          theta_e the weights of expert e, g_e that of the router

What is linear in its weights, such as a projection with its adapters or a norm, gives the same as a sum of outputs. So only
modules of several are averaged, once for every decision.

Shape legend: B batch, S sequence, T tokens of all sequences, P modules.
"""

from __future__ import annotations

import torch
from torch import nn


def merged_sum(x: torch.Tensor, parts: list[tuple[nn.Module, torch.Tensor]]) -> torch.Tensor:
    """What the average of the modules makes of each token, made once for each different row of weights (B, S).

    With gradients, once for each in every sequence, since equal weights of two are not the same function of the gate.
    """
    weights_TP = torch.stack([weight.expand(x.shape[:2]).flatten() for _, weight in parts], dim=-1)
    keys = weights_TP.detach()
    if torch.is_grad_enabled():
        sequence_T = torch.arange(len(x), device=x.device).repeat_interleave(x.shape[1])
        keys = torch.cat([keys, sequence_T[:, None].to(keys)], dim=-1)
    found, group_T = torch.unique(keys, dim=0, return_inverse=True)
    flat, results, places = x.flatten(0, 1), [], []
    for group in range(len(found)):
        rows = (group_T == group).nonzero().squeeze(-1)
        results.append(_run(flat[rows], [module for module, _ in parts], weights_TP[rows[0]]))
        places.append(rows)
    y = torch.cat(results)[torch.cat(places).argsort()]
    return y.reshape(*x.shape[:2], *y.shape[1:])


def _run(x: torch.Tensor, modules: list[nn.Module], weights_P: torch.Tensor) -> torch.Tensor:
    """The sum of the modules' weights on some tokens, nothing where no module has any; of one with all weight the module."""
    taken = [each for each in zip(modules, weights_P, strict=True) if bool(each[1])]
    if not taken:  # capacity left these tokens no expert
        return torch.zeros_like(modules[0](x))
    if len(taken) == 1 and float(taken[0][1]) == 1.0 and not taken[0][1].requires_grad:
        alone: torch.Tensor = taken[0][0](x)
        return alone
    every = [(dict(module.named_parameters()), weight) for module, weight in taken]
    first = every[0][0]
    if any(each.is_meta or not each.is_floating_point() for each in first.values()):
        raise ValueError("weights of experts are averaged where they are in memory, and not quantised")
    mean = {
        name: torch.stack([weight * each[name].float() for each, weight in every]).sum(0).to(one.dtype)
        for name, one in first.items()
    }
    y: torch.Tensor = torch.func.functional_call(taken[0][0], mean, (x,))
    return y
