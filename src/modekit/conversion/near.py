"""Experts that are nearly the same: channels in one order, distances, groups and their means (MC-SMoE, arXiv 2310.01334).

Shape legend: E experts, F hidden channels of an expert, C numbers of a channel (its rows of gate and up, its column of down).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array32 = npt.NDArray[np.float32]
Array64 = npt.NDArray[np.float64]
Group = list[int]

_MOST_CHANNELS = 4_096
"""An assignment takes the cube of their number; wider experts are compared in the order that they have."""


def in_order_of(expert_FC: Array32, other_FC: Array32) -> Array32:
    """The other expert with its channels in the order in which the products with the first one's sum to the most.

    An FFN is a sum over its channels, so that their order changes nothing.
    """
    from scipy.optimize import linear_sum_assignment

    if len(expert_FC) > _MOST_CHANNELS:
        return other_FC
    _, order = linear_sum_assignment(expert_FC @ other_FC.T, maximize=True)
    return np.asarray(other_FC[order])


def squared_distances(experts: Sequence[Array32]) -> Array64:
    """|a - b|^2 of every two experts, channels in one order, (E, E)."""
    count = len(experts)
    found = np.zeros((count, count))
    for one in range(count):
        for other in range(one + 1, count):
            apart = np.square(experts[one] - in_order_of(experts[one], experts[other]), dtype=np.float64).sum()
            found[one, other] = found[other, one] = float(apart)
    return found


def groups_of(distances_EE: Array64, counts_E: Array64, to: int) -> list[Group]:
    """So many groups of experts, each in order: the two whose merging costs least are merged until there are no more (Ward).

    Merging a and b costs n_a n_b / (n_a + n_b) |a - b|^2, n how often each is chosen: the squared error of their weighted mean.
    """
    groups, sizes = [[expert] for expert in range(len(distances_EE))], list(map(float, counts_E))
    apart = distances_EE.copy()
    while len(groups) > to:
        pairs = [(one, other) for one in range(len(groups)) for other in range(one + 1, len(groups))]
        costs = {(a, b): sizes[a] * sizes[b] / (sizes[a] + sizes[b] or 1.0) * apart[a, b] for a, b in pairs}
        one, other = min(pairs, key=costs.__getitem__)
        total, between = sizes[one] + sizes[other], apart[one, other]
        share = sizes[one] / total if total else 0.5
        apart[one] = share * apart[one] + (1 - share) * apart[other] - share * (1 - share) * between
        apart[:, one] = apart[one]
        apart[one, one] = 0.0
        apart = np.delete(np.delete(apart, other, 0), other, 1)
        groups[one], sizes[one] = groups[one] + groups[other], total
        del groups[other], sizes[other]
    return [sorted(group) for group in groups]


def mean_expert(experts: Sequence[Array32], shares: Array64) -> Array32:
    """The weighted mean, channels in the order of the expert with the largest share."""
    first = experts[int(shares.argmax())]
    total = sum(share * in_order_of(first, expert).astype(np.float64) for share, expert in zip(shares, experts, strict=True))
    return np.asarray(total, np.float32)
