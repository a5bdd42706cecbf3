"""Classifiers of a text: one decision for the whole model, made on the first tokens of each text.

scikit-learn fits them on pieces of the domains' text, as long as what the router will see of a text (classifiers.py). The gate
has all that is needed afterwards, in one table: the classifier's weights times how rare each term is, a last row for how rare
it is, and a last column for the intercepts (architecture/modekit_terms.py). No model is run.

Shape legend: N texts, S terms of one, V terms, E experts, P tokens after which the decision stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from modekit.loaded.load import load_tokenizer
from modekit.recipes.router import Router
from modekit.routing.examples import Tokens
from modekit.routing.fitting import FittedRouter, Fitting
from modekit.routing.last_token import rows_of_ngrams
from modekit.routing.token_text import TokenText, read_token_texts

_MOST_PIECES = 8_192
"""Of a domain's text: more make the fit slower and hardly better."""
_SHORT = 4
"""Held-out pieces are looked at as a whole, and to a quarter: much is decided before the end of a prefix."""


def classifier_gates(fitting: Fitting) -> FittedRouter:
    """The table of the classifier that was asked for, or of the best on held-out text. Raises TextError."""
    tokenizer = load_tokenizer(fitting.checkpoint.folder, run=fitting.run)
    texts = read_token_texts(fitting, tokenizer)
    terms = Terms(fitting.settings, int(fitting.checkpoint.config["vocab_size"]))
    fitting.run.begin("fit classifiers")
    gate, said = fitted_table(texts, terms, fitting.settings, sorted(set(tokenizer.all_special_ids)))
    (slot,) = fitting.checkpoint.slots
    assert gate.shape == slot.shape
    report = {"tokens": [len(each.ids_N) for each in texts], **said}
    return fitting.fitted([gate], [each.source["text"] for each in texts], report)


class Terms:
    """What a text's tokens count as: themselves, or the hashed n-gram that ends in each."""

    def __init__(self, settings: Router, vocabulary: int) -> None:
        self._hashed = "order" in settings.row.settings
        self._order, self.prefix = settings.order, settings.prefix_tokens or 0
        self.count = settings.buckets if self._hashed else vocabulary

    def rows(self, ids_S: torch.Tensor) -> np.ndarray:
        """Term of each token (S,), int64."""
        if self._hashed:
            return rows_of_ngrams(ids_S.numpy().astype(np.int64), self._order, self.count)
        return np.asarray(ids_S.numpy(), dtype=np.int64)

    def pieces(self, sequences: Sequence[Tokens]) -> list[np.ndarray]:
        """Terms of pieces of at most P tokens: all of a document, one after another; of a chat what a router sees of it, with
        what the template writes. So many as are learned from, from everywhere.
        """
        found = [piece for ids_S, start in sequences for piece in self._cut(ids_S, start)]
        step = max(1.0, len(found) / _MOST_PIECES)
        return [self.rows(found[int(place * step)]) for place in range(min(len(found), _MOST_PIECES))]

    def _cut(self, ids_S: torch.Tensor, start: int) -> Iterator[torch.Tensor]:
        if start:
            first = 0 if start < self.prefix - 1 else start
            yield ids_S[first : first + self.prefix]
            return
        yield from torch.split(ids_S, self.prefix)


def fitted_table(
    texts: Sequence[TokenText], terms: Terms, settings: Router, special: Sequence[int]
) -> tuple[np.ndarray, dict[str, object]]:
    """The gate (E + 1, V + 1) float32, and what the record says of it. `special`: tokens that weigh nothing."""
    from modekit.routing.classifiers import CLASSIFIERS, choose, counted, rareness, report_of, vectors

    counts = [counted(terms.pieces(text.sequences()), terms.count) for text in texts]
    idf_V = rareness(counts, [int(terms.rows(torch.tensor([token]))[0]) for token in special])
    held = [counted(_long_and_short(terms.pieces(text.held_out())), terms.count) for text in texts]
    own, others = ([vectors(each, idf_V) for each in part] for part in (counts, held))
    chosen = choose(settings.classifiers(CLASSIFIERS), own, others, settings.seed)
    linear = chosen.linear.at(settings.temperature)
    gate = np.zeros((len(texts) + 1, terms.count + 1), dtype=np.float32)
    gate[:-1, :-1], gate[:-1, -1], gate[-1, :-1] = linear.weights_EV * idf_V, linear.bias_E, idf_V
    return gate, report_of(chosen, held)


def _long_and_short(pieces: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [*pieces, *(piece[: max(1, len(piece) // _SHORT)] for piece in pieces)]
