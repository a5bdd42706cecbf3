"""Classifiers of a text: one decision for the whole model, made on the first tokens of each text.

scikit-learn fits them on pieces of the domains' text, as long as what the router will see of a text, and held-out text chooses
one. A text is the vector of its terms' counts, each times how rare the term is, brought to length 1 (tf-idf). All four
classifiers are linear in it: what they learn is a table W and an intercept b per domain. The gate has all that is needed
afterwards: the weights times how rare each term is, a last row for how rare it is, and a last column for the intercepts
(architecture/modekit_terms.py). No model is run, but for `hidden_gate`.

Shape legend: N texts, S terms of one, V terms, E experts or domains, D width of what a gate takes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import csr_matrix, diags, issparse, vstack
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.linear_model import LogisticRegression, SGDClassifier
from sklearn.metrics import f1_score
from sklearn.naive_bayes import MultinomialNB
from sklearn.preprocessing import normalize

from modekit.errors import RecipeError
from modekit.loaded.load import load_tokenizer
from modekit.recipes.router import Router
from modekit.routing.examples import Tokens
from modekit.routing.fitting import FittedRouter, Fitting
from modekit.routing.last_token import rows_of_ngrams
from modekit.routing.token_text import TokenText, read_token_texts

_TEMPERATURES = [2.0 ** (step / 4) for step in range(-24, 25)]
_C = 30.0
"""Of logistic regression, the inverse of its regularisation; benchmarks/classifiers.md."""

_MOST_PIECES = 8_192
"""Of a domain's text: more make the fit slower and hardly better."""
_SHORT = 4
"""Held-out pieces are looked at as a whole, and to a quarter: much is decided before the end of a prefix."""
_ASIDE = 10  # one kept input of so many is for comparing classifiers of router inputs
TextVectors: TypeAlias = "csr_matrix | np.ndarray"
"""Texts as vectors (N, V): a scipy matrix, or an array."""


def classifier_gates(fitting: Fitting) -> FittedRouter:
    """The table of the classifier that was asked for, or of the best on held-out text. Raises TextError."""
    tokenizer = load_tokenizer(fitting.checkpoint.folder, run=fitting.run)
    texts = read_token_texts(fitting, tokenizer)
    terms = Terms(fitting.settings, fitting.checkpoint.vocabulary)
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
    counts = [counted(terms.pieces(text.sequences()), terms.count) for text in texts]
    idf_V = rareness(counts, [int(terms.rows(torch.tensor([token]))[0]) for token in special])
    pieces = [terms.pieces(text.held_out()) for text in texts]
    short = [[piece[: max(1, len(piece) // _SHORT)] for piece in own] for own in pieces]
    held = [counted([*long, *also], terms.count) for long, also in zip(pieces, short, strict=True)]
    own, others = ([vectors(each, idf_V) for each in part] for part in (counts, held))
    chosen = choose(settings.classifiers(CLASSIFIERS), own, others, settings.seed)
    linear = chosen.linear.at(settings.temperature)
    gate = np.zeros((len(texts) + 1, terms.count + 1), dtype=np.float32)
    gate[:-1, :-1], gate[:-1, -1], gate[-1, :-1] = linear.weights_EV * idf_V, linear.bias_E, idf_V
    return gate, report_of(chosen, held)


@dataclass(frozen=True)
class Linear:
    """A classifier whose scores are x W^T + b.

    Attributes:
        weights_EV: W, float64.
        bias_E: b, float64.
    """

    weights_EV: np.ndarray
    bias_E: np.ndarray

    def scores(self, x_NV: TextVectors) -> np.ndarray:
        """Of texts, dense or sparse (N, E), float64."""
        scores_NE: np.ndarray = np.asarray(x_NV @ self.weights_EV.T) + self.bias_E
        return scores_NE

    def at(self, temperature: float) -> Linear:
        """With its scores divided by a temperature."""
        return Linear(self.weights_EV / temperature, self.bias_E / temperature)


@dataclass(frozen=True)
class Chosen:
    """The classifier that was taken, of those that were asked for.

    Attributes:
        name: which.
        linear: it, at the temperature that gives the domains of the held-out texts the largest likelihood.
        temperature: that one.
        scores: macro-F1 of all that were asked for on the held-out texts; empty where there were none to choose by.
    """

    name: str
    linear: Linear
    temperature: float
    scores: Mapping[str, float]


def counted(texts: Sequence[np.ndarray], terms: int) -> csr_matrix:
    """Counts (N, V) of texts that are rows of terms, int (S,) each."""
    lengths = [len(text) for text in texts]
    rows = np.concatenate([np.asarray(text, dtype=np.int64) for text in texts]) if texts else np.zeros(0, np.int64)
    shape = (len(texts), terms)
    counts = csr_matrix((np.ones(len(rows)), rows, np.concatenate([[0], np.cumsum(lengths)])), shape=shape)
    counts.sum_duplicates()
    return counts


def rareness(domains: Sequence[csr_matrix], silent: Sequence[int]) -> np.ndarray:
    """How rare each term is (V,), float64: log((1 + N) / (1 + texts that have it)) + 1, as scikit-learn smooths it.

    0 for `silent` terms and for those that no text has, which so weigh nothing.
    """
    counts_NV = vstack(domains, format="csr")
    idf_V: np.ndarray = TfidfTransformer().fit(counts_NV).idf_.copy()
    idf_V[np.asarray(counts_NV.sum(0)).ravel() == 0] = 0.0
    idf_V[list(silent)] = 0.0
    return idf_V


def vectors(counts_NV: csr_matrix, idf_V: np.ndarray) -> csr_matrix:
    """Counts times rareness at length 1, (N, V) sparse; a text without a term that counts stays zero."""
    weighed_NV = counts_NV @ diags(idf_V)
    return normalize(weighed_NV, copy=False) if weighed_NV.shape[0] else weighed_NV


def choose(names: Sequence[str], own: Sequence[TextVectors], held: Sequence[TextVectors], seed: int) -> Chosen:
    """The best of some classifiers by macro-F1 on held-out texts, ties to the first; the first where a domain has none.

    `own` and `held` are the texts (N, V) of every domain to learn from, and to choose by: sparse, or hidden states (N, D).
    """
    task = _LabelledTexts(*_together(own), len(own), seed)
    if not all(texts.shape[0] for texts in held):
        return Chosen(names[0], CLASSIFIERS[names[0]](task), 1.0, {})
    held_NV, labels_N = _together(held)
    trained = {name: CLASSIFIERS[name](task) for name in names}
    scores = {name: macro_f1(linear.scores(held_NV), labels_N, len(own)) for name, linear in trained.items()}
    best = max(names, key=lambda name: scores[name])
    temperature = _temperature(trained[best].scores(held_NV), labels_N, len(own))
    return Chosen(best, trained[best].at(temperature), temperature, scores)


def report_of(chosen: Chosen, held: Sequence[TextVectors]) -> dict[str, object]:
    """What the record says of a choice: the classifier, macro-F1 of all of them, on how many texts of each domain."""
    return {
        "classifier": chosen.name,
        "macro_f1": dict(chosen.scores),
        "chosen_on": [int(texts.shape[0]) for texts in held],
        "calibrated": chosen.temperature,
    }


def hidden_gate(kept: Sequence[np.ndarray], settings: Router) -> tuple[npt.NDArray[np.float32], dict[str, object]]:
    """The gate (E, D) of a classifier of kept router inputs, (N, D) float64 of every domain, and what the record says of it.

    It is linear and has no intercept, as all gates that read hidden states. Classifiers are compared on the last tenth of every
    domain's inputs, and the temperature is chosen there: those are of the last documents of the fit split, with chats of those
    that were cut from it, since the select split is not run through the models. Raises RecipeError without kept inputs.
    """
    if not all(map(len, kept)):
        raise RecipeError(
            "the classifier needs kept inputs and there are none",
            where="mixture.router.keep_tokens",
            expected="at least 1",
            remedy="fit again with keep_tokens > 0",
        )
    scale = np.sqrt(np.mean([np.square(each).mean() for each in kept])) or 1.0
    split = [max(1, len(each) - len(each) // _ASIDE) for each in kept]
    held = [each[at:] / scale for each, at in zip(kept, split, strict=True)]
    own = [each[:at] / scale for each, at in zip(kept, split, strict=True)]
    chosen = choose(settings.classifiers(CLASSIFIERS), own, held, settings.seed)
    gate_ED = chosen.linear.weights_EV / (scale * settings.temperature)
    return gate_ED.astype(np.float32), report_of(chosen, held)


def _together(domains: Sequence[TextVectors]) -> tuple[TextVectors, np.ndarray]:
    labels_N = np.repeat(np.arange(len(domains)), [texts.shape[0] for texts in domains])
    return (vstack(domains, format="csr") if issparse(domains[0]) else np.concatenate(domains)), labels_N


def macro_f1(scores_NE: np.ndarray, labels_N: np.ndarray, domains: int) -> float:
    """Mean over domains of the F1 of taking the domain with the largest score."""
    labels = list(range(domains))
    return float(f1_score(labels_N, scores_NE.argmax(1), labels=labels, average="macro", zero_division=0.0))


def _temperature(scores_NE: np.ndarray, labels_N: np.ndarray, domains: int) -> float:
    """The one that gives texts the largest likelihood; domains count equally.

    Of n texts of a domain (n + 1) / (n + 2) are taken for its own, the rest for the others' (Platt 1999, Probabilistic outputs
    for support vector machines): where all are told apart no temperature would be low enough, and few texts prove little.
    """
    if domains == 1:
        return 1.0
    counts_N = np.bincount(labels_N, minlength=domains)[labels_N]
    wanted_NE = np.repeat(1.0 / ((counts_N + 2) * (domains - 1))[:, None], domains, axis=1)
    wanted_NE[np.arange(len(labels_N)), labels_N] = (counts_N + 1) / (counts_N + 2)

    def loss(temperature: float) -> float:
        scaled_NE = scores_NE / temperature
        scaled_NE = scaled_NE - scaled_NE.max(1, keepdims=True)
        logs_NE = scaled_NE - np.log(np.exp(scaled_NE).sum(1, keepdims=True))
        return float(-((wanted_NE * logs_NE).sum(1) / counts_N).sum())

    best: float = min(_TEMPERATURES, key=loss)
    return best


@dataclass(frozen=True)
class _LabelledTexts:
    """TextVectors (N, V) to learn from, and their domains (N,)."""

    x_NV: TextVectors
    labels_N: np.ndarray
    domains: int
    seed: int

    @property
    def intercept(self) -> bool:
        """Vectors of counts have one; hidden states have none, since no gate that reads them has."""
        return bool(issparse(self.x_NV))


def _logistic(task: _LabelledTexts) -> Linear:
    """Multinomial logistic regression; the texts of every domain together weigh the same."""
    return _two_sided(LogisticRegression(C=_C, class_weight="balanced", max_iter=100, fit_intercept=task.intercept), task)


def _sgd(task: _LabelledTexts) -> Linear:
    """Each domain against the others, with the modified Huber loss, by stochastic gradient descent."""
    model = SGDClassifier(
        loss="modified_huber", alpha=1e-5, class_weight="balanced", random_state=task.seed, fit_intercept=task.intercept
    )
    return _two_sided(model, task)


def _two_sided(model: Any, task: _LabelledTexts) -> Linear:
    """Of two domains scikit-learn has one row, that of the second; of one none."""
    if task.domains == 1:
        return Linear(np.zeros((1, task.x_NV.shape[1])), np.zeros(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # what is not quite at its best is good enough to be compared
        used_U = np.flatnonzero(np.asarray(abs(task.x_NV).sum(0)).ravel())  # what no text has is not learned
        model.fit(task.x_NV[:, used_U], task.labels_N)
    weights = np.zeros((len(model.coef_), task.x_NV.shape[1]))
    weights[:, used_U] = model.coef_
    bias = np.broadcast_to(np.asarray(model.intercept_, np.float64), len(weights))
    if len(weights) == 1:
        weights, bias = np.concatenate([-weights, weights]) / 2, np.concatenate([-bias, bias]) / 2
    return Linear(weights, bias)


def _naive_bayes(task: _LabelledTexts) -> Linear:
    """Multinomial naive Bayes on tf-idf, all domains as likely beforehand: log p(term | domain), less its mean over domains."""
    model = MultinomialNB(alpha=0.1, fit_prior=False).fit(task.x_NV, task.labels_N)
    logs_EV = np.asarray(model.feature_log_prob_, np.float64)
    return Linear(logs_EV - logs_EV.mean(0), np.zeros(task.domains))


def _centroid(task: _LabelledTexts) -> Linear:
    """The cosine to the mean of a domain's texts, times a text's length, which is 1 where terms are counted."""
    means = [np.asarray(task.x_NV[task.labels_N == domain].mean(0)).ravel() for domain in range(task.domains)]
    return Linear(normalize(np.stack(means)), np.zeros(task.domains))


CLASSIFIERS: Mapping[str, Callable[[_LabelledTexts], Linear]] = {
    "logistic": _logistic,
    "sgd": _sgd,
    "naive_bayes": _naive_bayes,
    "centroid": _centroid,
}
"""By the name that a recipe has for it, in the order in which `auto` prefers them where they do equally well."""
