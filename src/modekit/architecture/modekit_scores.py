"""Routers whose scores are no linear function of what they read, and who is chosen by scores.

Shape legend: B batch, S sequence, G rows of the gate, E experts, R dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def cosine(products_BSG: torch.Tensor, gate_GD: torch.Tensor, experts: int) -> torch.Tensor:
    """X-MoE's router (Section 3.2, arXiv:2204.09179): s_e = cos(W x, v_e) / tau, W (R, D), v_e (R,).

    The gate has v_e in the first R columns of its first E rows, and W below. 1 / tau is the mean length of the v_e.
    """
    projected_BSR = products_BSG[..., experts:]
    experts_ER = gate_GD[:experts, : projected_BSR.shape[-1]]
    cosines_BSE = torch.nn.functional.linear(
        torch.nn.functional.normalize(projected_BSR, dim=-1), torch.nn.functional.normalize(experts_ER, dim=-1)
    )
    return experts_ER.square().sum(-1).clamp_min(1e-30).sqrt().mean() * cosines_BSE


def attention(products_BSG: torch.Tensor, gate_GD: torch.Tensor, experts: int) -> torch.Tensor:
    """Yuan 2.0-M32's router (Section 3.1, arXiv:2405.17976): s = softmax(q k^T) v with q, k and v (E,) linear in x.

    The gate has three rows for every expert: those of its query, key and value.
    """
    query, key, value = products_BSG.reshape(*products_BSG.shape[:-1], experts, 3).unbind(-1)
    scores_BSE1: torch.Tensor = (query[..., :, None] * key[..., None, :]).softmax(-1) @ value[..., None]
    return scores_BSE1.squeeze(-1)


FINISHED = {"cosine": cosine, "attention": attention}
"""Kind of score -> what makes scores (B, S, E) of the products with the gate's rows (B, S, G), averaged or not."""


def chosen(ranked: torch.Tensor, logits: torch.Tensor, routing: Mapping[str, Any]) -> torch.Tensor:
    """Which experts (last axis) take a token, by the order `ranked`: bool, of the logits' shape.

    groups: the best of each group of experts, in order, as equal as can be (k top-1 prototyping, Section 3.2,
    arXiv:2105.15082). threshold: all whose probability reaches theirs, the best where none does (top-any, Section 3.1,
    arXiv:2405.14297; of the softmax, not the sigmoid there, since fits set logits only up to what all have in common).
    """
    experts = logits.shape[-1]
    if routing.get("groups") is not None:
        groups = ranked.tensor_split(routing["groups"], dim=-1)
        return torch.cat([_best(each) for each in groups], dim=-1)
    if routing.get("top_k") is not None and routing["top_k"] < experts:
        return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, ranked.topk(routing["top_k"], dim=-1).indices, True)
    if routing.get("threshold") is not None:
        enough = (logits.softmax(-1) >= torch.tensor(routing["threshold"], device=logits.device)) | ranked.isposinf()
        return enough | (_best(ranked) & ~enough.any(-1, keepdim=True))
    if routing.get("top_p") is not None:
        order = ranked.argsort(dim=-1, descending=True, stable=True)
        sorted_p = logits.softmax(-1).gather(-1, order)
        enough = sorted_p.cumsum(-1) - sorted_p < routing["top_p"]  # what stands before it does not suffice
        return torch.zeros_like(enough).scatter(-1, order, enough)
    return torch.ones_like(logits, dtype=torch.bool)


def _best(ranked: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(ranked, dtype=torch.bool).scatter(-1, ranked.argmax(-1, keepdim=True), True)
