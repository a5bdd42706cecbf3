"""A sample of documents -> groups: latent semantic analysis of their words, k-means, and how many groups there are.

Groups of four fifths of the documents say how likely the words of the fifth are. A group is worth having while it makes
held-out text likelier by WORTH (benchmarks/discover.md).

Shape legend: N documents, V words that count, D dimensions, G groups.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from scipy.special import logsumexp
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.exceptions import ConvergenceWarning
from sklearn.naive_bayes import MultinomialNB
from sklearn.preprocessing import normalize
from threadpoolctl import threadpool_limits

from modekit.errors import TextError
from modekit.run import Run
from modekit.search.discover.documents import WHERE, DocumentSample, Labels, rare_words, word_rows
from modekit.search.discover.result import DiscoverSettings

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

WORTH = 0.06
"""Nats per word of held-out text that another group must be worth, on the mean of those that come with it."""
DIMENSIONS = 20
STARTS = 10
"""Of k-means; the one whose groups make the words likeliest is taken."""
_PARTS = 5
_PRIOR = 300.0  # words of all documents that every group is given besides its own: small groups are not too sure

Points = npt.NDArray[np.float64]
"""(N, D), each of length one, or zero for a document without a word that counts."""
Shares = npt.NDArray[np.float64]
"""(V,): how often each word stands in documents; they sum to one."""


class WordSpace:
    """Documents as points: rare words, weighted by inverse document frequency, on the dimensions in which documents differ."""

    def fit(self, documents: Sequence[str], dimensions: int, seed: int) -> Points:
        """Choose the dimensions and return the documents' points."""
        rows = word_rows(documents)
        self._kept = rare_words(rows)
        rows = rows[:, self._kept]
        self._weights_V = -np.log(np.maximum(np.asarray(rows.astype(bool).mean(axis=0)).ravel(), 1e-9))
        self._svd = TruncatedSVD(max(1, min(dimensions, min(rows.shape) - 1)), random_state=seed)
        with one_thread():
            return _on_sphere(self._svd.fit_transform(self._weighted(rows)))

    def points(self, documents: Sequence[str]) -> Points:
        """Of other documents."""
        return _on_sphere(self._svd.transform(self._weighted(word_rows(documents)[:, self._kept])))

    def _weighted(self, rows: csr_matrix) -> csr_matrix:
        return normalize(rows.multiply(self._weights_V).tocsr())


@dataclass(frozen=True)
class Clusters:
    """The centres of groups (G, D), and the group of each document that they were found with."""

    centres_GD: npt.NDArray[np.float64]
    labels: Labels

    def nearest(self, points: Points) -> Labels:
        """The group of each of other documents."""
        return np.asarray((points @ self.centres_GD.T - 0.5 * (self.centres_GD**2).sum(axis=1)).argmax(axis=1))


@dataclass(frozen=True)
class Grouping:
    """How a document is assigned to a group, the largest first; `held_out` for 1, 2, ... groups where numbers were tried."""

    space: WordSpace
    clusters: Clusters
    held_out: Sequence[float]

    def assign(self, documents: Sequence[str]) -> Labels:
        """The groups of documents."""
        points = self.space.points(documents)
        with one_thread():
            return self.clusters.nearest(points)


def group_documents(sample: DocumentSample, settings: DiscoverSettings, run: Run) -> Grouping:
    """As many groups as are asked for or worth having. Raises TextError where there are not so many."""
    rows = word_rows(sample.beginnings)
    rows = rows[:, rare_words(rows)]
    if not rows.shape[1]:
        raise TextError(
            "the documents have nothing in common",
            where=WHERE,
            found=f"{sample.documents:,} documents without a shared word",
            remedy="give more text",
        )
    space = WordSpace()
    points = space.fit(sample.beginnings, max(DIMENSIONS, settings.domains or 0), settings.seed)
    held_out: list[float] = []
    with one_thread():
        if settings.domains is None:
            held_out = try_numbers(
                points, rows, settings.most, settings.seed, lambda done: run.progress("try numbers", done, settings.most)
            )
        domains = settings.domains or choose(held_out)
        found = cluster(points, rows, domains, word_shares(rows), settings.seed) if len(points) >= domains else None
    if found is None:
        raise TextError(
            "the documents cannot be split into so many domains",
            where=f"--domains {domains}",
            found=f"{sample.documents:,} documents, in {len(np.unique(points.round(9), axis=0)):,} places by what they have",
            remedy="give more text, or ask for fewer domains",
        )
    order = np.argsort(-np.bincount(found.labels, minlength=domains), kind="stable")
    return Grouping(space, Clusters(found.centres_GD[order], np.argsort(order)[found.labels]), held_out)


def try_numbers(points: Points, rows: csr_matrix, most: int, seed: int, advance: Callable[[int], None]) -> list[float]:
    """Mean held-out log-likelihood (nats per word) for 1, 2, ... groups; it ends where documents lie in fewer places."""
    tried: list[float] = []
    while len(tried) < most and (found := _held_out(points, rows, len(tried) + 1, seed)) is not None:
        tried.append(found)
        advance(len(tried))
    return tried


def choose(held_out: Sequence[float]) -> int:
    """The number whose gain over a single group is furthest above what its groups must be worth; of equals the smallest."""
    return 1 + int(np.argmax([each - WORTH * number for number, each in enumerate(held_out)])) if held_out else 1


def gains(held_out: Sequence[float]) -> list[float | None]:
    """What each number adds to the one before it; None for the first."""
    return [None, *(later - earlier for earlier, later in pairwise(held_out))][: len(held_out)]


def _held_out(points: Points, rows: csr_matrix, groups: int, seed: int) -> float | None:
    parts = np.arange(len(points)) % _PARTS
    everywhere, total = word_shares(rows), 0.0
    for part in range(min(_PARTS, len(points))):
        kept, out = np.flatnonzero(parts != part), np.flatnonzero(parts == part)
        found = cluster(points[kept], rows[kept], groups, everywhere, seed) if len(kept) >= groups else None
        if found is None:
            return None
        total += log_likelihood(word_model(rows[kept], found.labels, everywhere), rows[out])
    return total / float(rows.sum())


def cluster(points: Points, rows: csr_matrix, groups: int, shares_V: Shares, seed: int) -> Clusters | None:
    """The best of several k-means; None where documents lie in fewer places than groups.

    `shares_V`: of words in all documents, of which these may be a part; none is zero.
    """
    best: tuple[float, Clusters] | None = None
    for start in range(STARTS if groups > 1 else 1):
        found = _k_means(points, groups, STARTS * seed + start)
        if len(np.unique(found.labels)) < groups:
            continue
        model = word_model(rows, found.labels, shares_V)
        joint_NG = model.predict_joint_log_proba(rows) - model.class_log_prior_
        likely = float(joint_NG[np.arange(len(found.labels)), found.labels].sum())
        if best is None or likely > best[0]:
            best = likely, found
    return None if best is None else best[1]


def _k_means(points: Points, groups: int, seed: int) -> Clusters:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer places than groups: the caller sees that
        found = KMeans(min(groups, len(points)), n_init=1, random_state=seed % 2**32).fit(points)
    return Clusters(np.asarray(found.cluster_centers_), np.asarray(found.labels_, dtype=np.intp))


def word_model(rows: csr_matrix, labels: Labels, shares_V: Shares) -> MultinomialNB:
    """Groups as distributions of words, smoothed by those of all documents. Every group must have a document."""
    return MultinomialNB(alpha=_PRIOR * shares_V).fit(rows, labels)


def log_likelihood(model: MultinomialNB, rows: csr_matrix) -> float:
    """Of documents that belong to an unknown group each, in nats, summed."""
    return float(logsumexp(model.predict_joint_log_proba(rows), axis=1).sum())


def word_shares(rows: csr_matrix) -> Shares:
    """Of documents in which every word stands somewhere."""
    found_V = np.asarray(rows.sum(axis=0), dtype=np.float64).ravel()
    return np.asarray(found_V / found_V.sum())


def one_thread() -> threadpool_limits:
    """While open, sums are made in one order, whatever this machine has."""
    return threadpool_limits(1)


def _on_sphere(points: Points) -> Points:
    return np.asarray(normalize(np.asarray(points, dtype=np.float64)))
