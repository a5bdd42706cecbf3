"""Where documents lie: alike ones near each other, as points on a sphere.

By units: what stands in few documents says most (inverse document frequency), and of that the few directions in which documents
differ most (latent semantic analysis). By hidden states: the mean over a document's tokens, in the middle of the base.

Shape legend: N documents, H hashed units, V units that count, D directions of the space.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.preprocessing import normalize
from threadpoolctl import threadpool_limits

from modekit.search.discover.units import Rows, Units
from modekit.search.discover.words import READ

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DIRECTIONS = 20
_TOKENS = 512  # of a document, whose hidden states are averaged
_BATCH = 2_048  # tokens at once, of which all layers' states are in memory, but no logits
_RARE = 0.05  # of the documents: what stands in more of them says how a text is written rather than what it is about
_ENOUGH = 16  # rare units that half of the documents must have; where texts are short, less rare ones count

Points = npt.NDArray[np.float64]
"""(N, D), each of length one, or zero where nothing is known of a document."""
Kept = npt.NDArray[np.intp]
"""(V,): which units count."""


class Space(Protocol):
    """Where documents lie."""

    def learn(self, documents: Sequence[str], directions: int, seed: int) -> Points:
        """Choose the directions, and say where these documents lie."""

    def points(self, documents: Sequence[str]) -> Points:
        """Where others lie."""


class UnitSpace:
    """By the units that documents share, rare ones alone."""

    def __init__(self, units: Units, keep: Callable[[Rows], Kept] | None = None) -> None:
        self._units, self._keep = units, keep or rare_units

    def learn(self, documents: Sequence[str], directions: int, seed: int) -> Points:
        """As the protocol says."""
        rows = self._units.rows(documents)
        self._kept = self._keep(rows)
        rows = rows[:, self._kept]
        self._weights_V = -np.log(np.maximum(np.asarray(rows.astype(bool).mean(axis=0)).ravel(), 1e-9))
        self._svd = TruncatedSVD(max(1, min(directions, min(rows.shape) - 1)), random_state=seed)
        with one_thread():
            return _on_sphere(self._svd.fit_transform(self._weighted(rows)))

    def points(self, documents: Sequence[str]) -> Points:
        """As the protocol says."""
        return _on_sphere(self._svd.transform(self._weighted(self._units.rows(documents)[:, self._kept])))

    def _weighted(self, rows: Rows) -> Rows:
        return normalize(rows.multiply(self._weights_V).tocsr())


class HiddenSpace:
    """By a base model's hidden states."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._model, self._tokenizer = model, tokenizer

    def learn(self, documents: Sequence[str], directions: int, seed: int) -> Points:
        """As the protocol says."""
        means = self._means(documents)
        self._pca = PCA(max(1, min(directions, *means.shape)), random_state=seed)
        with one_thread():
            return _on_sphere(self._pca.fit_transform(means))

    def points(self, documents: Sequence[str]) -> Points:
        """As the protocol says."""
        means = self._means(documents)
        with one_thread():
            return _on_sphere(self._pca.transform(means))

    def _means(self, documents: Sequence[str]) -> npt.NDArray[np.float64]:
        """Mean hidden states (N, hidden); zero for a document that has less than two tokens."""
        import torch

        from modekit.text.sequences import encode, make_batches

        found: dict[int, Any] = {}
        for place, document in enumerate(documents):
            pieces = encode(self._tokenizer, [document[:READ]], max_tokens=_TOKENS, sequence_length=_TOKENS)
            found.update((place, piece) for piece in pieces[:1])
        places, run = list(found), self._model.base_model
        means = np.zeros((len(documents), self._model.get_input_embeddings().weight.shape[1]))
        with torch.inference_mode():
            for batch in make_batches(list(found.values()), tokens=_BATCH):
                ids, mask = (each.to(self._model.device) for each in (batch.input_ids, batch.mask))
                said = run(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True, use_cache=False)
                layers = said.hidden_states
                kept = layers[len(layers) // 2].double() * mask[..., None]
                mean = kept.sum(1) / mask.sum(1, keepdim=True)
                means[[places[row] for row in batch.rows]] = mean.cpu().numpy()
        return means


def one_thread() -> threadpool_limits:
    """While open, sums are made in one order, whatever this machine has; a base model runs outside of it."""
    return threadpool_limits(1)


def rare_units(rows: Rows) -> Kept:
    """Which units count, (V,): those of two documents or more, and of few enough that they tell documents apart.

    That is one document in twenty; more, where half of the documents would be left with hardly any unit.
    """
    documents = rows.shape[0]
    found_H = np.asarray(rows.sum(axis=0)).ravel()
    most = _RARE * documents
    while True:
        kept = np.flatnonzero((found_H >= 2) & (found_H <= most))
        if most >= documents or np.median(np.asarray(rows[:, kept].sum(axis=1))) >= _ENOUGH:
            return kept
        most *= 2


def _on_sphere(points: Points) -> Points:
    return np.asarray(normalize(np.asarray(points, dtype=np.float64)))
