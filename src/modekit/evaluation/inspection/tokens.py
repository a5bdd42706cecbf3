"""Tokens as text, words made of them, and the tokens that an expert is leading on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from modekit.evaluation.inspection.result import TopToken

_INCOMPLETE = "\ufffd"  # what a decoder makes of the first bytes of a character
_LONGEST_WAIT = 8  # tokens for a character to become whole; a real U+FFFD never does
_FEWEST = 5  # a token seen less often says little
_SHOWN = 12


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; "" for one that only begins a character, which the token that ends it brings, and
    for a token of beginning that the tokenizer put in front.
    """
    texts: list[str] = []
    begin = read = 0  # a few tokens before the new one tell the decoder about spaces
    for stop in range(1, len(ids) + 1):
        before = str(tokenizer.decode(ids[begin:read], clean_up_tokenization_spaces=False))
        now = str(tokenizer.decode(ids[begin:stop], clean_up_tokenization_spaces=False))
        if now.endswith(_INCOMPLETE) and stop < len(ids) and stop - read < _LONGEST_WAIT:
            texts.append("")
            continue
        texts.append(now[len(before) :])
        begin, read = read, stop
    if ids and ids[0] == tokenizer.bos_token_id:
        texts[0] = ""
    return texts


def split_text(text: str, offsets: Sequence[tuple[int, int]]) -> list[str]:
    """The text itself cut at the tokens' ends, (start, end) in characters; what a tokenizer drops goes to the next token."""
    texts, done = [], 0
    for _, stop in offsets:
        texts.append(text[done:stop])  # nothing for a token that was put in, or that ends inside a character
        done = max(done, stop)
    texts[-1] += text[done:]
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

    @property
    def often_V(self) -> npt.NDArray[np.int64]:
        """Tokens seen at least five times."""
        return np.flatnonzero(self._counts_V >= _FEWEST)

    def by_expert(self, tokenizer: PreTrainedTokenizerBase, names: Sequence[str]) -> dict[str, list[TopToken]]:
        """Per expert the tokens with the largest mean weight, of those seen at least five times."""
        often_V = self.often_V
        mean_E = self._sums_VE.sum(0) / max(1, self._counts_V.sum())
        shares_VE = self._sums_VE[often_V] / self._counts_V[often_V, None]
        found = {}
        for place, name in enumerate(names):
            best = np.lexsort((often_V, -self._counts_V[often_V], -shares_VE[:, place].round(6)))[:_SHOWN]
            found[name] = [
                TopToken(
                    token=str(tokenizer.decode([int(often_V[row])])),
                    count=int(self._counts_V[often_V[row]]),
                    share=float(shares_VE[row, place]),
                    lift=float(shares_VE[row, place] / mean_E[place]),
                )
                for row in best
                if shares_VE[row, place] > 0
            ]
        return found
