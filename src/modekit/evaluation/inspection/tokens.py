"""Tokens as text, words made of them for a person to read, and which tokens go to an expert.

Shape legend: S tokens of a sequence, E experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from modekit.evaluation.inspection.result import TextTrace

_INCOMPLETE = "\ufffd"  # what a decoder makes of the first bytes of a character
_LONGEST_WAIT = 8  # tokens for a character to become whole; a real U+FFFD never does
_FEWEST = 5  # a token seen less often says little
_SHOWN = 10
_LONGEST_WORD = 24  # characters; scripts without spaces are cut


class RunningText:
    """A text that comes token by token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = []  # a few tokens before the new one tell the decoder about spaces
        self._waiting: list[int] = []

    def add(self, token: int, *, last: bool = False) -> str:
        """What a token adds; "" for one that only begins a character, which the token that ends it brings."""
        self._waiting.append(token)
        before, now = self._decoded(self._before), self._decoded(self._before + self._waiting)
        if now.endswith(_INCOMPLETE) and not last and len(self._waiting) < _LONGEST_WAIT:
            return ""
        self._before, self._waiting = self._waiting, []
        return now[len(before) :]

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; "" for one that only begins a character, and for a token of beginning that the
    tokenizer put in front.
    """
    text = RunningText(tokenizer)
    texts = [text.add(token, last=place == len(ids) - 1) for place, token in enumerate(ids)]
    if ids and ids[0] == tokenizer.bos_token_id:
        texts[0] = ""
    return texts


class TopTokens:
    """Weights of the experts summed by token id."""

    def __init__(self, vocabulary: int, experts: int) -> None:
        self._sums_VE = np.zeros((vocabulary, experts))
        self._counts_V = np.zeros(vocabulary, np.int64)

    def add(self, ids: Sequence[int], weights_SE: npt.NDArray[np.float32]) -> None:
        """Take the tokens of a sequence; the weights are the mean over routers."""
        np.add.at(self._sums_VE, np.asarray(ids), weights_SE)
        np.add.at(self._counts_V, np.asarray(ids), 1)

    def by_expert(self, tokenizer: PreTrainedTokenizerBase, names: Sequence[str]) -> dict[str, list[str]]:
        """Per expert the tokens with the largest mean weight, of those seen at least five times."""
        often_V = np.flatnonzero(self._counts_V >= _FEWEST)
        shares_VE = self._sums_VE[often_V] / self._counts_V[often_V, None]
        found = {}
        for place, name in enumerate(names):
            best = np.lexsort((often_V, -self._counts_V[often_V], -shares_VE[:, place].round(6)))[:_SHOWN]
            found[name] = [str(tokenizer.decode([int(often_V[row])])) for row in best if shares_VE[row, place] > 0]
        return found


@dataclass(frozen=True)
class Word:
    """Text without the space around it, the sum of its tokens' losses (None when none was scored), and mean weights (E).

    Tokens of space count with the word behind them.
    """

    text: str
    loss: float | None
    weights_E: npt.NDArray[np.float64]

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
        ended = token.text[:1].isspace() or text[-1:].isspace() or len(text) >= _LONGEST_WORD
        if ended and text.strip():
            while not tokens[place - 1].text:  # they begin the character that this one ends
                place -= 1
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
    return Word(text.strip(), sum(losses) if losses else None, weights)
