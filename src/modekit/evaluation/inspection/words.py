"""Tokens joined to words, for a person to read.

Shape legend: T tokens, E experts, R routers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from modekit.evaluation.inspection.result import TextTrace
from modekit.routing.unseen import DECIDES

_LONGEST = 24  # characters; scripts without spaces are cut


@dataclass(frozen=True)
class Word:
    """Text without the space around it, the sum of its tokens' losses (None when none was scored), mean weights (E), and by how
    much experts stand above the base at its last token (None where the router does not say).

    Tokens of space count with the word behind them.
    """

    text: str
    loss: float | None
    weights_E: npt.NDArray[np.float64]
    over_base: float | None = None

    @property
    def leader(self) -> int:
        """Place of the expert with the largest weight."""
        return int(self.weights_E.argmax())


def words_of(trace: TextTrace, most: int) -> tuple[list[Word], bool]:
    """The first `most` words of a trace, weights as means over its routers; and whether there are more."""
    words: list[Word] = []
    start, text = 0, ""
    tokens = trace.tokens
    for place, token in enumerate(tokens):
        ended = token.text[:1].isspace() or text[-1:].isspace() or len(text) >= _LONGEST
        if ended and text.strip():
            words.append(_word(trace, start, place, text))
            if len(words) == most:
                return words, True
            start, text = place, ""
        text += token.text
    if text.strip():
        words.append(_word(trace, start, len(tokens), text))
    return words, False


def _word(trace: TextTrace, start: int, stop: int, text: str) -> Word:
    losses = [token.loss for token in trace.tokens[start:stop] if token.loss is not None]
    weights = np.mean([np.mean(router[start:stop], axis=0) for router in trace.weights], axis=0)
    over_base = (trace.scores or {}).get(DECIDES)
    return Word(text.strip(), sum(losses) if losses else None, weights, None if over_base is None else over_base[stop - 1])
