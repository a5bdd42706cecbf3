"""What groups say of words: a group is a distribution of units, and a document a draw from one of them.

Shape legend: N documents, V units that count, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from modekit.search.discover.units import Rows

_PRIOR = 300.0
"""Units of all documents together that every group is given besides its own: small groups are not too sure of what they saw."""
Labels = npt.NDArray[np.intp]
"""(N,): the group of each document."""
Shares = npt.NDArray[np.float64]
"""(V,): how often each unit stands in documents; they sum to one."""


@dataclass(frozen=True)
class Evidence:
    """Log-probabilities of units in groups (G, V), and of groups (G,)."""

    units_GV: npt.NDArray[np.float64]
    groups_G: npt.NDArray[np.float64]

    def of(self, rows: Rows) -> npt.NDArray[np.float64]:
        """Log-probability of each document's units in each group, (N, G)."""
        return np.asarray(rows @ self.units_GV.T)

    def held_out(self, rows: Rows) -> float:
        """Log-likelihood of documents that nobody has put to a group, in nats, summed."""
        joint_NG = self.of(rows) + self.groups_G
        largest_N = joint_NG.max(axis=1)
        return float((largest_N + np.log(np.exp(joint_NG - largest_N[:, None]).sum(axis=1))).sum())


def evidence_of(rows: Rows, labels: Labels, groups: int, background_V: Shares) -> Evidence:
    """Of documents that are in groups. `background_V`: of all documents; none is zero."""
    counts_GV = np.stack([np.asarray(rows[labels == group].sum(axis=0)).ravel() for group in range(groups)]).astype(np.float64)
    units_GV = np.log(counts_GV + _PRIOR * background_V) - np.log(counts_GV.sum(axis=1, keepdims=True) + _PRIOR)
    return Evidence(units_GV, np.log(np.bincount(labels, minlength=groups) / len(labels)))


def background(rows: Rows) -> Shares:
    """Of documents in which every unit stands somewhere."""
    found_V = np.asarray(rows.sum(axis=0), dtype=np.float64).ravel()
    return np.asarray(found_V / found_V.sum())
