"""How sure a score is: the bootstrap over what was drawn, the same draws for every model, so that differences are paired.

Shape legend: N items, C clusters (documents, or single items), R draws, K numbers that an item adds to the sums.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from modekit.files.typed import Figure

DRAWS = 1_000
_LEVEL = (2.5, 97.5)  # percentiles: 95 %

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value and the bounds of its 95 % interval; None where nothing can be drawn again."""

    value: Figure
    low: Figure | None = None
    high: Figure | None = None


@dataclass(frozen=True)
class ItemSums:
    """One model on one task: what every item adds (N, K), and what the sums (..., K) are worth."""

    parts_NK: Floats
    worth: Callable[[Floats], Floats]

    @property
    def value(self) -> float:
        """Of all items."""
        return float(self.worth(self.parts_NK.sum(0)))


def mean_sample(values: Sequence[float]) -> ItemSums:
    """Items whose score is their mean."""
    parts = np.stack([np.asarray(values, dtype=np.float64), np.ones(len(values))], axis=1)
    return ItemSums(parts, lambda sums: np.asarray(sums[..., 0] / sums[..., 1]))


def bleu_sample(pairs: Sequence[tuple[str, str]]) -> ItemSums:
    """Pairs (reference, text) whose score is corpus BLEU, from each sentence's counts."""
    from sacrebleu import sentence_bleu
    from sacrebleu.metrics.bleu import BLEU

    scores = [sentence_bleu(text, [reference]) for reference, text in pairs]
    parts = np.array([[*score.counts, *score.totals, score.sys_len, score.ref_len] for score in scores], dtype=np.float64)

    def one(sums_K: Floats) -> float:
        counts = [round(number) for number in sums_K]
        return float(BLEU.compute_bleu(counts[:4], counts[4:8], counts[8], counts[9], smooth_method="exp").score)

    return ItemSums(parts, lambda sums: np.apply_along_axis(one, -1, sums))


@dataclass(frozen=True)
class Bootstrap:
    """A task's models under the same draws: values, and values of every draw (R,); no draws when there is but one cluster."""

    values: Mapping[str, float]
    draws: Mapping[str, Floats | None]


def draw(samples: Mapping[str, ItemSums], clusters: Sequence[Hashable], name: str) -> Bootstrap:
    """Draw clusters with replacement, R times; all models get the same draws, which depend on `name` alone.

    `clusters` names the cluster of every item: items of one document are drawn together.
    """
    places = {cluster: place for place, cluster in enumerate(dict.fromkeys(clusters))}
    of_item_N = np.array([places[cluster] for cluster in clusters])
    count = len(places)
    values = {model: sample.value for model, sample in samples.items()}
    if count < 2:
        return Bootstrap(values, dict.fromkeys(samples))
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    times_RC = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=DRAWS)
    draws: dict[str, Floats | None] = {}
    for model, sample in samples.items():
        sums_CK = np.zeros((count, sample.parts_NK.shape[1]))
        np.add.at(sums_CK, of_item_N, sample.parts_NK)
        draws[model] = sample.worth(times_RC @ sums_CK)
    return Bootstrap(values, draws)


def average(tasks: Sequence[Bootstrap]) -> Bootstrap:
    """The mean over tasks, each drawn by itself."""
    models = list(tasks[0].values)
    draws = {model: [task.draws[model] for task in tasks] for model in models}
    return Bootstrap(
        {model: float(np.mean([task.values[model] for task in tasks])) for model in models},
        {
            model: None if any(each is None for each in several) else np.mean([e for e in several if e is not None], axis=0)
            for model, several in draws.items()
        },
    )


def rows(drawn: Bootstrap) -> dict[str, Estimate]:
    """Every model's score."""
    return {model: _estimate(value, drawn.draws[model]) for model, value in drawn.values.items()}


def differences(drawn: Bootstrap, of: str) -> dict[str, Estimate]:
    """Score of one model minus that of each other one; empty when it was not run."""
    if of not in drawn.values:
        return {}
    own = drawn.draws[of]
    found = {}
    for model, value in drawn.values.items():
        if model != of:
            other = drawn.draws[model]
            both = None if own is None or other is None else own - other
            found[model] = _estimate(drawn.values[of] - value, both)
    return found


def _estimate(value: float, draws_R: Floats | None) -> Estimate:
    if draws_R is None:
        return Estimate(value)
    low, high = np.percentile(draws_R, _LEVEL)
    return Estimate(value, float(low), float(high))
