"""Groups of documents: k-means on the sphere, begun several times; the best is the one whose groups make the units likeliest.

That is the measure by which their number is chosen, too. k-means' own mostly takes the same grouping: benchmarks/discover.md.

Shape legend: N documents, V units that count, D directions, G groups.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

from modekit.search.discover.evidence import Labels, Shares, evidence_of
from modekit.search.discover.space import Points
from modekit.search.discover.units import Rows

BEGINNINGS = 10


@dataclass(frozen=True)
class Grouping:
    """The middles of groups (G, D), and the group of each document that they were found with."""

    middles_GD: npt.NDArray[np.float64]
    labels: Labels

    def nearest(self, points: Points) -> Labels:
        """The group of each of other documents."""
        return np.asarray((points @ self.middles_GD.T - 0.5 * (self.middles_GD**2).sum(axis=1)).argmax(axis=1))


def group(points: Points, rows: Rows, groups: int, background_V: Shares, seed: int) -> Grouping | None:
    """The best of several groupings; None where documents lie in fewer places than there are to be groups.

    `background_V`: how often units stand in all documents, in more than these where these are a part; none is zero.
    """
    best: tuple[float, Grouping] | None = None
    for beginning in range(BEGINNINGS if groups > 1 else 1):
        found = _begun(points, groups, BEGINNINGS * seed + beginning)
        if len(np.unique(found.labels)) < groups:
            continue
        said_NG = evidence_of(rows, found.labels, groups, background_V).of(rows)
        likely = said_NG[np.arange(len(found.labels)), found.labels].sum()
        if best is None or likely > best[0]:
            best = float(likely), found
    return None if best is None else best[1]


def _begun(points: Points, groups: int, seed: int) -> Grouping:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer places than groups: the caller sees that
        found = KMeans(min(groups, len(points)), n_init=1, random_state=seed % 2**32).fit(points)
    return Grouping(np.asarray(found.cluster_centers_), np.asarray(found.labels_, dtype=np.intp))
