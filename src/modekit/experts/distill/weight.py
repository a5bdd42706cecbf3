"""How much cross-entropy counts against distillation, step by step.

Fixed, or the adaptive rule of arXiv:2407.19610 (its code; made finite here): over the last k = max(20, steps // 100) values of
each loss L,

    w(L) = 1 - clamp((L[-1] - L[-k]) / mean(L[-k:]), 0, 1)
    share of cross-entropy = w(CE) / (w(CE) + w(KD))

A loss that falls has w = 1 however fast it falls: while both fall the share is exactly one half, and only a loss that rises
counts less. Where both rise by more than their mean, 0 / 0 is one half, too. A history that is not full is taken as it is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from modekit.experts.distill.settings import DistillSettings


class CrossEntropyWeight:
    """What cross-entropy counts in the next step, of `steps` in all; distillation counts the rest."""

    def __init__(self, settings: DistillSettings, steps: int) -> None:
        self._settings = settings
        length = max(20, steps // 100)
        self._cross_entropy: deque[float] = deque(maxlen=length)
        self._distillation: deque[float] = deque(maxlen=length)
        self.steps_done = 0

    def remember(self, cross_entropy: float, distillation: float) -> None:
        """The losses of the step that has just ended, per predicted token."""
        self._cross_entropy.append(cross_entropy)
        self._distillation.append(distillation)
        self.steps_done += 1

    def share(self) -> float:
        """Between 0 and 1."""
        if not self._settings.adaptive:
            return self._settings.weights
        return adaptive_share(self._cross_entropy, self._distillation)

    def factors(self) -> tuple[float, float]:
        """What cross-entropy and distillation are multiplied with.

        In turn, each counts twice its share, so that two steps together ask for what two combined steps ask for.
        """
        share = self.share()
        if not self._settings.alternate:
            return share, 1.0 - share
        return (2.0 * share, 0.0) if self.steps_done % 2 == 0 else (0.0, 2.0 * (1.0 - share))


def adaptive_share(cross_entropy: Sequence[float], distillation: Sequence[float]) -> float:
    """The share of cross-entropy after some steps, of the histories of both losses."""
    ours, theirs = _steadiness(cross_entropy), _steadiness(distillation)
    return 0.5 if ours + theirs == 0 else ours / (ours + theirs)


def _steadiness(losses: Sequence[float]) -> float:
    """w(L): 1 for a loss that does not rise, 0 for one that rises by its mean or more."""
    mean = sum(losses) / len(losses) if losses else 0.0
    if mean <= 0:
        return 1.0
    return 1.0 - min(1.0, max(0.0, (losses[-1] - losses[0]) / mean))
