"""Classifiers of a text: one decision for the whole model, made on the first tokens of each text.

scikit-learn fits them on pieces of the domains' text, as long as what the router will see of a text, and held-out text chooses
one. A text is the vector of its tokens' counts, each times how rare the token is, brought to length 1 (tf-idf). All four
classifiers are linear in it: what they learn is a table W and an intercept b per domain. The gate has all that is needed
afterwards: the weights times how rare each token is, a last row for how rare it is, and a last column for the intercepts
(architecture/modekit_terms.py). No model is run.

Shape legend: N texts, S tokens of one, V vocabulary, E experts or domains.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix, diags, vstack
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.linear_model import LogisticRegression, SGDClassifier
from sklearn.metrics import f1_score
from sklearn.naive_bayes import MultinomialNB
from sklearn.preprocessing import normalize

from modekit.loaded.load import load_tokenizer
from modekit.recipes.router import Router
from modekit.routing.examples import Tokens
from modekit.routing.fit import FittedRouter, Fitting
from modekit.routing.token_text import TokenText, read_token_texts

_TEMPERATURES = [2.0 ** (step / 4) for step in range(-24, 25)]
_C = 30.0
"""Of logistic regression, the inverse of its regularisation; benchmarks/classifiers.md."""
_MOST_PIECES = 8_192
"""Of a domain's text: more make the fit slower and hardly better."""
_SHORT = 4
"""Held-out pieces are looked at as a whole, and to a quarter: much is decided before the end of a prefix."""


def classifier_gates(fitting: Fitting) -> FittedRouter:
    """The table of the classifier that was asked for, or of the best on held-out text. Raises TextError."""
    tokenizer = load_tokenizer(fitting.checkpoint.folder, run=fitting.run)
    texts = read_token_texts(fitting, tokenizer)
    fitting.run.begin("fit classifiers")
    special, vocabulary = sorted(set(tokenizer.all_special_ids)), fitting.checkpoint.vocabulary
    gate, said = fitted_table(texts, vocabulary, fitting.settings, special)
    report = {"tokens": [len(each.ids_N) for each in texts], **said}
    return fitting.fitted([gate], [each.source["text"] for each in texts], report)


def fitted_table(
    texts: Sequence[TokenText], vocabulary: int, settings: Router, special: Sequence[int]
) -> tuple[np.ndarray, dict[str, object]]:
    """The gate (E + 1, V + 1) float32, and what the record says of it. `special`: tokens that weigh nothing."""
    prefix = settings.prefix_tokens or 0
    counts = [_counted(_pieces(text.sequences(), prefix), vocabulary) for text in texts]
    idf_V = _rareness(counts, special)
    pieces = [_pieces(text.held_out(), prefix) for text in texts]
    short = [[piece[: max(1, len(piece) // _SHORT)] for piece in own] for own in pieces]
    held = [_counted([*long, *also], vocabulary) for long, also in zip(pieces, short, strict=True)]
    name, linear, report = _choose(settings, *(_Task.of(each, idf_V, settings.seed) for each in (counts, held)))
    gate = np.zeros((len(texts) + 1, vocabulary + 1), dtype=np.float32)
    gate[:-1, :-1] = linear.weights_EV / settings.temperature * idf_V
    gate[:-1, -1], gate[-1, :-1] = linear.bias_E / settings.temperature, idf_V
    return gate, {"classifier": name, **report, "chosen_on": [int(each.shape[0]) for each in held]}


def _pieces(sequences: Sequence[Tokens], prefix: int) -> list[np.ndarray]:
    """Pieces (S,) int64 of at most so many tokens: all of a document, one after another; of a chat what a router sees of it,
    with what the template writes. As many as are learned from, from everywhere.
    """

    def cut(ids_S: torch.Tensor, start: int) -> Iterator[torch.Tensor]:
        if start:
            first = 0 if start < prefix - 1 else start
            yield ids_S[first : first + prefix]
        else:
            yield from torch.split(ids_S, prefix)

    found = [piece for ids_S, start in sequences for piece in cut(ids_S, start)]
    step = max(1.0, len(found) / _MOST_PIECES)
    return [found[int(place * step)].long().numpy() for place in range(min(len(found), _MOST_PIECES))]


def _counted(texts: Sequence[np.ndarray], vocabulary: int) -> csr_matrix:
    """Counts (N, V) of the tokens of texts (S,)."""
    ids = np.concatenate([*texts, np.zeros(0, np.int64)])
    starts = np.cumsum([0, *map(len, texts)])
    counts_NV = csr_matrix((np.ones(len(ids)), ids, starts), shape=(len(texts), vocabulary))
    counts_NV.sum_duplicates()
    return counts_NV


def _rareness(domains: Sequence[csr_matrix], silent: Sequence[int]) -> np.ndarray:
    """How rare each token is (V,), float64: log((1 + N) / (1 + texts that have it)) + 1, as scikit-learn smooths it.

    0 for `silent` tokens and for those that no text has, which so weigh nothing.
    """
    counts_NV = vstack(domains, format="csr")
    idf_V: np.ndarray = TfidfTransformer().fit(counts_NV).idf_.copy()
    idf_V[np.asarray(counts_NV.sum(0)).ravel() == 0] = 0.0
    idf_V[list(silent)] = 0.0
    return idf_V


@dataclass(frozen=True)
class _Task:
    """Texts (N, V) at length 1 (zero without a token that counts), their domains (N,), and how many each of those has (E,)."""

    x_NV: csr_matrix
    labels_N: np.ndarray
    sizes_E: np.ndarray
    seed: int

    @classmethod
    def of(cls, domains: Sequence[csr_matrix], idf_V: np.ndarray, seed: int) -> _Task:
        """Of the counts of every domain's texts."""
        sizes_E = np.array([each.shape[0] for each in domains])
        weighed_NV = vstack(domains, format="csr") @ diags(idf_V)
        x_NV = normalize(weighed_NV, copy=False) if weighed_NV.shape[0] else weighed_NV
        return cls(x_NV, np.repeat(np.arange(len(domains)), sizes_E), sizes_E, seed)


@dataclass(frozen=True)
class Linear:
    """A classifier whose scores are x W^T + b: W (E, V) and b (E,), float64."""

    weights_EV: np.ndarray
    bias_E: np.ndarray

    def scores(self, x_NV: csr_matrix) -> np.ndarray:
        """Of texts (N, E), float64."""
        scores_NE: np.ndarray = np.asarray(x_NV @ self.weights_EV.T) + self.bias_E
        return scores_NE


def _choose(settings: Router, own: _Task, held: _Task) -> tuple[str, Linear, dict[str, object]]:
    """The best of the classifiers that are asked for by macro-F1 on held-out texts, at the temperature that gives these the
    largest likelihood; ties to the first; the first where a domain has none. With its name, and what the record says.
    """
    names = settings.classifiers(CLASSIFIERS)
    if not held.sizes_E.all():
        return names[0], CLASSIFIERS[names[0]](own), {"macro_f1": {}, "calibrated": 1.0}
    trained = {name: CLASSIFIERS[name](own) for name in names}
    scores = {name: _macro_f1(linear.scores(held.x_NV), held) for name, linear in trained.items()}
    best = max(names, key=lambda name: scores[name])
    temperature = _temperature(trained[best].scores(held.x_NV), held)
    linear = Linear(trained[best].weights_EV / temperature, trained[best].bias_E / temperature)
    return best, linear, {"macro_f1": scores, "calibrated": temperature}


def _macro_f1(scores_NE: np.ndarray, held: _Task) -> float:
    """Mean over domains of the F1 of taking the domain with the largest score."""
    labels = range(len(held.sizes_E))
    return float(f1_score(held.labels_N, scores_NE.argmax(1), labels=labels, average="macro", zero_division=0.0))


def _temperature(scores_NE: np.ndarray, held: _Task) -> float:
    """The one that gives texts the largest likelihood; domains count equally.

    Of n texts of a domain (n + 1) / (n + 2) are taken for its own, the rest for the others' (Platt 1999, Probabilistic outputs
    for support vector machines): where all are told apart no temperature would be low enough, and few texts prove little.
    """
    labels_N, domains = held.labels_N, len(held.sizes_E)
    if domains == 1:
        return 1.0
    counts_N = held.sizes_E[labels_N]
    wanted_NE = np.repeat(1.0 / ((counts_N + 2) * (domains - 1))[:, None], domains, axis=1)
    wanted_NE[np.arange(len(labels_N)), labels_N] = (counts_N + 1) / (counts_N + 2)

    def loss(temperature: float) -> float:
        scaled_NE = scores_NE / temperature
        scaled_NE = scaled_NE - scaled_NE.max(1, keepdims=True)
        logs_NE = scaled_NE - np.log(np.exp(scaled_NE).sum(1, keepdims=True))
        return float(-((wanted_NE * logs_NE).sum(1) / counts_N).sum())

    best: float = min(_TEMPERATURES, key=loss)
    return best


def _logistic(task: _Task) -> Linear:
    """Multinomial logistic regression; the texts of every domain together weigh the same."""
    return _two_sided(LogisticRegression(C=_C, class_weight="balanced", max_iter=100), task)


def _sgd(task: _Task) -> Linear:
    """Each domain against the others, with the modified Huber loss, by stochastic gradient descent."""
    model = SGDClassifier(loss="modified_huber", alpha=1e-5, class_weight="balanced", random_state=task.seed)
    return _two_sided(model, task)


def _two_sided(model: Any, task: _Task) -> Linear:
    """Of two domains scikit-learn has one row, that of the second; of one none."""
    if len(task.sizes_E) == 1:
        return Linear(np.zeros((1, task.x_NV.shape[1])), np.zeros(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # what is not quite at its best is good enough to be compared
        used_U = np.flatnonzero(np.asarray(abs(task.x_NV).sum(0)).ravel())  # what no text has is not learned
        model.fit(task.x_NV[:, used_U], task.labels_N)
    weights = np.zeros((len(model.coef_), task.x_NV.shape[1]))
    weights[:, used_U] = model.coef_
    bias = np.asarray(model.intercept_, np.float64)
    if len(weights) == 1:
        weights, bias = np.concatenate([-weights, weights]) / 2, np.concatenate([-bias, bias]) / 2
    return Linear(weights, bias)


def _naive_bayes(task: _Task) -> Linear:
    """Multinomial naive Bayes on tf-idf, all domains as likely beforehand: log p(token | domain), less its mean."""
    model = MultinomialNB(alpha=0.1, fit_prior=False).fit(task.x_NV, task.labels_N)
    logs_EV = np.asarray(model.feature_log_prob_, np.float64)
    return Linear(logs_EV - logs_EV.mean(0), np.zeros(len(task.sizes_E)))


def _centroid(task: _Task) -> Linear:
    """The cosine to the mean of a domain's texts."""
    means = [np.asarray(task.x_NV[task.labels_N == domain].mean(0)).ravel() for domain in range(len(task.sizes_E))]
    return Linear(normalize(np.stack(means)), np.zeros(len(task.sizes_E)))


CLASSIFIERS: Mapping[str, Callable[[_Task], Linear]] = {
    "logistic": _logistic,
    "sgd": _sgd,
    "naive_bayes": _naive_bayes,
    "centroid": _centroid,
}
"""By the name that a recipe has for it, in the order in which `auto` prefers them where they do equally well."""
