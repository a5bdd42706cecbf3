"""One seed of translation.py: text, models and scores, each made once; labels at test time, and what translates under them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

import translation_text
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.evaluation.domains import Domain, held_out_domains, score_domain
from modekit.evaluation.translation.evaluate import Scorer, translated
from modekit.evaluation.translation.results import Decoding
from modekit.loaded.load import load_model
from modekit.loaded.shapes import mixture_of
from modekit.loaded.text_training import Training
from modekit.text.document import Pair
from modekit.text.sequences import encode
from study import mean_losses
from translation_models import (
    Maker,
    Mode,
    Size,
    count,
    labelled,
    piece_tokenizer,
    tagged,
    with_generic,
    word_tokenizer,
)
from translation_text import GENERIC, Corpus

P, SHARE = 0.3, 0.3
"""Probability that a label is drawn anew, and share of generic text."""
BEAMS = 4
_TRAINING = Training(learning_rate=2e-3, warmup=0.1, by_length=True)
"""From nothing AdamW wants small steps, and many: translation.md, How AdamW learns it."""
_FINE = _TRAINING.with_(learning_rate=3e-3)
SIZES = {
    "synthetic": Size(
        256,
        48,
        0.0,
        _TRAINING.with_(steps=2_000, batch_tokens=400, sequence_length=40),
        _FINE.with_(steps=60, batch_tokens=1_600, sequence_length=40),
        Training(steps=60, batch_tokens=1_600, sequence_length=40, learning_rate=1e-2, by_length=True),
    ),
    "real": Size(
        256,
        128,
        0.0,
        _TRAINING.with_(steps=3_000, batch_tokens=2_000, sequence_length=96),
        _FINE.with_(steps=200, batch_tokens=3_000, sequence_length=96),
        Training(steps=200, batch_tokens=3_000, sequence_length=96, learning_rate=1e-2, by_length=True),
    ),
}
HELD_OUT = {"synthetic": 100, "real": 150}
Way = Callable[[str | None], tuple[PreTrainedModel, bool, Any]]
"""Label -> the model that translates under it, whether it reads the label's token, and a context that is open meanwhile."""


class Study:
    """One seed of one part: models and scores, each made once; `scores.json` has what is known."""

    def __init__(self, root: Path, part: str, seed: int) -> None:
        self.part, self.seed, self.size = part, seed, SIZES[part]
        self.folder = root / part / f"seed{seed}"
        self._root, self._file = root, self.folder / "scores.json"
        self.scores: dict[str, Any] = json.loads(self._file.read_text()) if self._file.exists() else {}

    def prepare(self) -> None:
        """Text and tokenizer."""
        text = self._root / "text" / self.part
        if self.part == "synthetic":
            self.corpus, language = translation_text.synthetic(text, pairs=1_500, generic=3_000)
            tokenizer = word_tokenizer(language.words, self.corpus.seen)
        else:
            self.corpus = translation_text.catalogues(text)
            names = (*self.corpus.seen, GENERIC)
            sides = [side for name in names for pair in self.corpus.pairs(name, "fit") for side in (pair.source, pair.target)]
            tokenizer = piece_tokenizer(sides, 2_000, self.corpus.seen)
        self.made = Maker(self.folder, tokenizer, self.size, self.seed)
        self.fit = {name: self.corpus.pairs(name, "fit") for name in self.corpus.seen}
        self.generic = self.corpus.pairs(GENERIC, "fit")
        self.held_out = held_out(self.corpus, HELD_OUT[self.part])

    def keep(self, name: str, make: Callable[[], Any]) -> Any:
        """What is known under a name, or what is made now."""
        if name not in self.scores:
            started = time.perf_counter()
            self.scores[name] = make()
            self._file.write_text(json.dumps(self.scores, indent=1))
            print(f"{self.part} {self.seed}: {name} ({time.perf_counter() - started:.0f} s)", flush=True)
        return self.scores[name]

    def pairs(self, *, tag: bool, p: float = 0.0, mode: Mode = "uniform", generic: bool = True) -> list[Pair]:
        """What a model for all domains is trained on."""
        some = labelled(self.fit, p, mode, self.seed)
        some = with_generic(some, self.generic, SHARE) if generic else some
        return [tagged(pair, label if tag else None) for pair, label in some]

    def write(self, way: Way, domain: str, label: str | None, beams: int) -> list[str]:
        """Translations of a domain's held-out sources."""
        model, reads_tag, context = way(label)
        some = [tagged(pair, label if reads_tag else None) for pair in self.held_out[domain]]
        longest = self.size.positions
        encoded = encode(self.made.tokenizer, some, max_tokens=10**9, sequence_length=longest)
        with context:
            return translated(model, self.made.tokenizer, encoded, Decoding(beams, 50, longest))

    def loss(self, way: Way, domain: str, label: str | None) -> float:
        """Nats per token of a domain's held-out targets."""
        model, reads_tag, context = way(label)
        some = [tagged(pair, label if reads_tag else None) for pair in self.held_out[domain]]
        encoded = encode(self.made.tokenizer, some, max_tokens=10**9, sequence_length=self.size.positions)
        with context:
            return score_domain(model, Domain(domain, None, encoded), lambda _: None).loss

    def asked(self, *, labels: bool) -> dict[str, Mapping[str, str | None]]:
        """Column -> domain -> the label that is told; without `labels` the columns that tell none."""
        seen, unseen = list(self.corpus.seen), list(self.corpus.unseen)
        every: dict[str, Mapping[str, str | None]] = {
            "right": {each: each for each in seen},
            "wrong": dict(zip(seen, [*seen[1:], seen[0]], strict=True)),
            "none": dict.fromkeys(seen),
            "unseen, no label": dict.fromkeys(unseen),
            "unseen, a label": dict(zip(unseen, seen, strict=False)),
        }
        return {column: asked for column, asked in every.items() if labels or column in ("none", "unseen, no label")}

    def losses(self, way: Way, *, labels: bool) -> dict[str, dict[str, float]]:
        """Column -> domain -> loss."""
        return {
            column: {domain: self.loss(way, domain, label) for domain, label in asked.items()}
            for column, asked in self.asked(labels=labels).items()
        }

    def matrix(self, way: Way, *, labels: bool, sizes: tuple[int, int], beams: int = 1) -> dict[str, Any]:
        """Scores by column and domain, sources per second, total and active parameters."""
        scorer, started, count = Scorer(), time.perf_counter(), 0
        columns: dict[str, Any] = {}
        for column, asked in self.asked(labels=labels).items():
            said = {domain: self.write(way, domain, label, beams) for domain, label in asked.items()}
            columns[column] = {
                domain: vars(scorer.corpus(texts, [pair.target for pair in self.held_out[domain]]))
                for domain, texts in said.items()
            }
            count += sum(map(len, said.values()))
        self.scores.setdefault("signatures", scorer.signature)
        speed = count / (time.perf_counter() - started)
        return {**columns, "total": sizes[0], "active": sizes[1], "sources per second": speed}


def held_out(corpus: Corpus, most: int) -> dict[str, list[Pair]]:
    """Of seen domains the report split, of unseen ones what there is."""
    found = {name: corpus.pairs(name, "report") for name in corpus.seen}
    for name in corpus.unseen:
        found[name] = [pair for split in ("report", "select", "fit") for pair in corpus.pairs(name, split)]
    return {name: pairs[:most] for name, pairs in found.items()}


def of_dense(folder: Path, tag: bool) -> tuple[Way, tuple[int, int]]:
    """A model that has all of it in every pass."""
    model = load_model(folder)
    return lambda _label: (model, tag, nullcontext()), (count(model), count(model))


def of_loaded(model: PreTrainedModel, checkpoint: Checkpoint, tag: bool) -> tuple[Way, tuple[int, int]]:
    """A mixture in memory that is routed as it will."""
    return lambda _label: (model, tag, nullcontext()), (checkpoint.parameters.total, checkpoint.parameters.active)


def of_mixture(checkpoint: Checkpoint, *, gate: bool, tag: bool = False) -> tuple[Way, tuple[int, int]]:
    """A mixture that is routed, by the label where there is one and it steers the gate."""
    model, places = load_model(checkpoint.folder), {name: place for place, name in enumerate(checkpoint.names)}
    sizes = checkpoint.parameters

    def way(label: str | None) -> tuple[PreTrainedModel, bool, Any]:
        forced = gate and label is not None
        return model, tag, mixture_of(model, checkpoint).forced(places[label or ""]) if forced else nullcontext()

    return way, (sizes.total, sizes.active)


def of_adapters(checkpoint: Checkpoint, base: Path) -> tuple[Way, tuple[int, int]]:
    """The adapter of the label; without one the base."""
    way, sizes = of_mixture(checkpoint, gate=True)
    plain = of_dense(base, False)[0]
    return lambda label: way(label) if label is not None else plain(label), sizes


def losses(checkpoint: Checkpoint, base: Path) -> dict[str, Any]:
    """Losses of base, own experts and mixture by domain, and the share of the own expert's gap that the mixture closes."""
    domains = held_out_domains(checkpoint, tokens_per_domain=8_192, sequence_length=128)
    model, own = load_model(checkpoint.folder), dict[str, float]()
    for domain in domains:
        if domain.expert is not None and domain.name != GENERIC:
            with mixture_of(model, checkpoint).forced(domain.expert):
                own |= mean_losses(model, [domain])
    rows = {"base": mean_losses(load_model(base), domains), "own": own, "mixture": mean_losses(model, domains)}
    closed = {name: (rows["base"][name] - rows["mixture"][name]) / (rows["base"][name] - found) for name, found in own.items()}
    return {"losses": rows, "closed": closed}
