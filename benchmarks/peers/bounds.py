"""What any way to put fine-tunes together is compared with: base, experts, averages, ensembles, one model per request.

Shape legend: B batch, S sequence, V vocabulary, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from peers.choose import SELECT_TOKENS, choose
from peers.peer import Formula, Made, Peer, Pool
from peers.pool import read_text
from peers.score import counts, scores, side_by_side, texts_of

BASE, BEST, AVERAGE = "base", "best single expert", "weight average"
BESIDE = "each model by itself"
PREFIX = 32
"""Tokens of a request that its classifier reads, as in front.md."""


def models_of(pool: Pool) -> list[PreTrainedModel]:
    """Whole models, in the order of the pool."""
    return [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in pool.whole.values()]


def save(pool: Pool, weights: Mapping[str, torch.Tensor], out: Path) -> Path:
    """A model of the base's class with these weights."""
    model = AutoModelForCausalLM.from_pretrained(pool.base, dtype=torch.float32)
    model.load_state_dict(dict(weights))
    model.save_pretrained(out)
    return out


def mean_of(states: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Of every tensor."""
    return {name: sum(each[name] for each in states) / len(states) for name in states[0]}


def moved(base: Mapping[str, torch.Tensor], states: Sequence[Mapping[str, torch.Tensor]], by: Sequence[float]) -> dict:
    """Base plus the experts' differences, each times its factor (task arithmetic)."""
    return {
        name: origin + sum(factor * (each[name] - origin) for factor, each in zip(by, states, strict=True))
        for name, origin in base.items()
    }


def _average(pool: Pool, out: Path) -> Made:
    return Made(save(pool, mean_of([model.state_dict() for model in models_of(pool)]), out / "average"))


def _best(pool: Pool, _out: Path) -> Made:
    name, made = choose(pool, list(pool.whole), lambda name: Made(pool.whole[name]))
    return Made(made.model, f"chosen on select: {name}")


def _best_other(pool: Pool, _out: Path) -> Made:
    """Whether experts gain anything over each other: of each text, the expert of another one that knows it best."""
    texts = texts_of(pool.base, pool.select, SELECT_TOKENS)
    each = {name: scores(path, texts, pool.base) for name, path in pool.whole.items()}
    best = {text: min((name for name in each if name != text), key=lambda name: each[name][text][0]) for text in pool.whole}
    folders = {text: pool.whole[name] for text, name in best.items()}
    note = "chosen on select: " + ", ".join(f"{name} for {text}" for text, name in best.items())
    return Made(folders, note, total=side_by_side(pool), active=counts(pool.base)[0], engines=BESIDE)


@dataclass(frozen=True)
class Ensemble:
    """Probabilities of all models; `posterior`: weighted by how well each has predicted the text so far."""

    models: Sequence[PreTrainedModel]
    posterior: bool

    def logits(self, ids_BS: torch.Tensor) -> torch.Tensor:
        """Logarithms of the mixed probabilities."""
        each_EBSV = torch.stack([model(input_ids=ids_BS, use_cache=False).logits.log_softmax(-1) for model in self.models])
        if not self.posterior:
            return each_EBSV.logsumexp(0)
        said_EBS = each_EBSV[:, :, :-1].gather(-1, ids_BS[None, :, 1:, None].expand(len(self.models), -1, -1, -1))[..., 0]
        past_EBS = torch.nn.functional.pad(said_EBS.cumsum(-1), (1, 0))  # before place s: tokens 1 to s, which are read
        return (each_EBSV + past_EBS.log_softmax(0)[..., None]).logsumexp(0)


def _ensemble(posterior: bool, pool: Pool, _out: Path) -> Made:
    active = counts(pool.base)[0] * len(pool.whole)
    return Made(Ensemble(models_of(pool), posterior), total=side_by_side(pool), active=active, engines=BESIDE)


@dataclass(frozen=True)
class PerRequest:
    """One model for a whole text, named by a classifier of its first PREFIX tokens; the first ones are the base's."""

    base: PreTrainedModel
    models: Sequence[PreTrainedModel]
    classifier: Callable[[Sequence[int]], int]

    def logits(self, ids_BS: torch.Tensor) -> torch.Tensor:
        """The base's, and behind the prefix those of the chosen model."""
        chosen = self.models[self.classifier(ids_BS[0, :PREFIX].tolist())]
        before = self.base(input_ids=ids_BS[:, :PREFIX], use_cache=False).logits[:, : PREFIX - 1]
        return torch.cat([before, chosen(input_ids=ids_BS, use_cache=False).logits[:, PREFIX - 1 :]], 1)


def classifier_of(pool: Pool) -> Callable[[Sequence[int]], int]:
    """What names the place of an expert by the first PREFIX tokens of a request."""
    tokenizer, texts, labels = AutoTokenizer.from_pretrained(pool.base), list[str](), list[int]()
    for place, path in enumerate(pool.text.values()):
        for document in read_text(path):
            ids = tokenizer(document)["input_ids"]
            pieces = [_words(ids[start : start + PREFIX]) for start in range(0, len(ids), PREFIX)]
            texts += pieces
            labels += [place] * len(pieces)
    vectors = TfidfVectorizer(token_pattern=r"\d+", ngram_range=(1, 2), sublinear_tf=True)
    classifier = LogisticRegression(max_iter=300, class_weight="balanced", C=10).fit(vectors.fit_transform(texts), labels)
    return lambda ids: int(classifier.predict(vectors.transform([_words(ids[:PREFIX])]))[0])


def _words(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))


def per_request(pool: Pool, _out: Path) -> Made:
    base = AutoModelForCausalLM.from_pretrained(pool.base, dtype=torch.float32).eval()
    note = f"the first {PREFIX} tokens name it and are the base's"
    model = PerRequest(base, models_of(pool), classifier_of(pool))
    return Made(model, note, total=side_by_side(pool), active=counts(pool.base)[0], engines=BESIDE)


BOUNDS: list[Peer] = [
    Formula(BASE, lambda pool, out: Made(pool.base), "bound"),
    Formula(BEST, _best, "bound"),
    Formula("best other expert (oracle)", _best_other, "bound"),
    Formula(AVERAGE, _average, "2203.05482, formula"),
    Formula("ensemble of probabilities, uniform", partial(_ensemble, False), "formula; all experts run"),
    Formula("branch-train-merge, posterior", partial(_ensemble, True), "2208.03306, formula; all experts run"),
    Formula("one model per request, TF-IDF", per_request, "after 2406.18665, scikit-learn"),
]
