"""Classifiers of a text by the counts of its first terms: its tokens.

Every text has its own decision, which is causal and exact under padding and token-by-token generation: what is kept beside the
key-value cache are its first terms, and all that is said of them is computed from these alone.

Shape legend: B batch, S sequence, P first terms that count, E experts, V terms, G rows and D columns of the gate.
"""

from __future__ import annotations

import torch

_TINY = 1e-30  # under a root, of a text without a term that counts


def classify(
    rows_BS: torch.Tensor, mask_BS: torch.Tensor | None, state: torch.Tensor | None, prefix: int, gate_GD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a classifier says of the text up to each token, (B, S, E), and the state after the last one; see the two below."""
    mask_BS = torch.ones_like(rows_BS) if mask_BS is None else mask_BS.to(rows_BS)
    terms_BP, seen_BS = first_terms(rows_BS, mask_BS, state, prefix)
    scores_BPE = counted_terms(terms_BP, gate_GD)
    return scores_BPE.gather(1, seen_BS[..., None].expand(-1, -1, scores_BPE.shape[-1])), terms_BP


def first_terms(
    rows_BS: torch.Tensor, mask_BS: torch.Tensor, state: torch.Tensor | None, prefix: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first terms of every text, and how many of them there are up to each token.

    `rows_BS` are the columns of a table that tokens choose; `mask_BS` is 1 for real tokens, pads may stand anywhere. `state`
    (B, P) holds the terms before this pass, P = `prefix`: rows plus one, 0 for none. Returns the state after the last token,
    (B, P) int64, and the counts (B, S) int64, at most P.
    """
    state = rows_BS.new_zeros((len(rows_BS), prefix)) if state is None else state.to(rows_BS)
    seen = (state > 0).sum(1, keepdim=True) + mask_BS.cumsum(1)
    free = torch.where((mask_BS > 0) & (seen <= prefix), seen - 1, prefix)  # what has no place goes behind the last
    terms = torch.nn.functional.pad(state, (0, 1)).scatter(1, free, rows_BS + 1)[:, :prefix]
    return terms, seen.clamp_max(prefix)


def counted_terms(terms_BP: torch.Tensor, gate_GD: torch.Tensor) -> torch.Tensor:
    """What a linear classifier says of a text by its counts c: for every expert e, after 0 to P terms, (B, P + 1, E),

        b_e + sum_v W_ev r_v c_v / sqrt(sum_v (r_v c_v)^2)

    with r how rare a term is. `gate_GD` (E + 1, V + 1) has W_ev r_v and, in its last column, b_e; its last row is r.
    The k-th occurrence of a term adds r^2 k^2 - r^2 (k - 1)^2 = r^2 (2 k - 1) under the root.
    """
    terms = (terms_BP - 1).clamp_min(0)
    real_BP = (terms_BP > 0).to(gate_GD)
    values_BPG = torch.nn.functional.embedding(terms, gate_GD.t()) * real_BP[..., None]
    occurrence_BP = (terms_BP[:, :, None] == terms_BP[:, None, :]).tril().sum(-1)
    squares_BP = (values_BPG[..., -1].square() * (2 * occurrence_BP - 1)).cumsum(1)
    scores_BPE = values_BPG[..., :-1].cumsum(1) / squares_BP.clamp_min(_TINY).sqrt()[..., None]
    return torch.nn.functional.pad(scores_BPE, (0, 0, 1, 0)) + gate_GD[:-1, -1]
