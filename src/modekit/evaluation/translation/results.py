"""The table of `modekit eval-translation`: scores, speed, examples side by side, and how they are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from pydantic import Field, JsonValue

from modekit.errors import check_packages
from modekit.evaluation.identity import ReadText
from modekit.evaluation.markdown import markdown_table, plain
from modekit.evaluation.results import Kind
from modekit.evaluation.results_folder import CheckpointResult
from modekit.evaluation.translation.decoding import Decoding
from modekit.files.figures import count_of, or_dash
from modekit.files.typed import Count, Label, Number
from modekit.text.document import Pair


@dataclass(frozen=True)
class TranslationSettings(Decoding):
    """How all models wrote, how many pairs of a domain at most, and on which machine."""

    pairs: Count = field(kw_only=True)
    machine: str = field(kw_only=True)


@dataclass(frozen=True)
class TranslationRow:
    """One model. `tokens` were written in `seconds` on the machine that measured it; `cut` translations ended at the limit."""

    name: Label
    kind: Kind
    total_parameters: Count
    active_parameters: Count
    scores: Annotated[Mapping[Label, TranslationScore], Field(alias="domains")]
    tokens: Count
    seconds: Number
    cut: Count

    @property
    def tokens_per_second(self) -> float | None:
        """None where nothing was written."""
        return self.tokens / self.seconds if self.tokens and self.seconds > 0 else None

    def mean(self, domains: Sequence[str]) -> TranslationScore | None:
        """The arithmetic mean of the domains' corpus scores; None unless all were scored, and there are some."""
        if not domains or any(domain not in self.scores for domain in domains):
            return None
        scores = [self.scores[domain] for domain in domains]
        return TranslationScore(
            sum(score.bleu for score in scores) / len(scores), sum(score.chrf for score in scores) / len(scores)
        )


@dataclass(frozen=True)
class TranslationResults(CheckpointResult):
    """translate.json. `domains` have an expert and enter the means; `unseen` have none.

    `differences` (by domain) and `examples` compare the mixture with the base, and are empty without a base.
    """

    rows: Annotated[Sequence[TranslationRow], Field(max_length=2**10)]
    domains: Sequence[Label]
    unseen: Sequence[Label]
    settings: TranslationSettings
    signatures: Signatures
    text: Mapping[str, ReadText]
    differences: Mapping[Label, Compared]
    examples: Annotated[Sequence[TranslationExample], Field(max_length=2**10)]
    notes: Sequence[str] = field(default_factory=list)

    file = "translate.json"
    command = "modekit eval-translation"

    def row(self, name: str) -> TranslationRow:
        """A row by its name."""
        return next(row for row in self.rows if row.name == name)

    def cells(self) -> int:
        """Of a row per model and a column per domain."""
        return len(self.rows) * (1 + len(self.domains) + len(self.unseen))

    def as_data(self) -> dict[str, JsonValue]:
        """Plain data for JSON, with the speed and the means that the table shows."""
        data: dict[str, Any] = super().as_data()
        for row, said in zip(self.rows, data["rows"], strict=True):
            mean = row.mean(self.domains)
            said |= {"tokens_per_second": row.tokens_per_second, "mean": None if mean is None else asdict(mean)}
        return data

    def said(self) -> str:
        """How all models wrote, in a line."""
        beams = self.settings.beams
        way = "greedily" if beams == 1 else f"with {beams} beams"
        return f"BLEU / chrF of held-out sources, translated {way}, at most {self.settings.max_new_tokens} tokens each."

    def table(self, between: str = " / ") -> tuple[list[str], list[list[str]]]:
        """Header and cells: those of `score_table`, tokens per second, and parameters; `between` separates two figures."""
        header, body = score_table(self.rows, self.domains, self.unseen, between)
        for row, cells in zip(self.rows, body, strict=True):
            cells.append(or_dash(row.tokens_per_second, ",.0f"))
            cells.append(f"{count_of(row.total_parameters)}{between}{count_of(row.active_parameters)}")
        return [*header, "tokens per second", f"total{between}active"], body

    def markdown(self) -> str:
        """For translate.md: the table, what has to be said of it, and the examples, as text without markup."""
        parts = [self.said(), "", markdown_table(*self.table()), "", *(f"* {note}" for note in self.notes)]
        for domain, counted in self.differences.items():
            parts += ["", f"## {plain(domain)}", "", said_of(counted)]
            examples = [each for each in self.examples if each.domain == domain]
            if examples:
                parts += ["", markdown_table(["", *(f"chrF {each.gain:+.1f}" for each in examples)], _lines(examples), plain)]
        return "\n".join(parts) + "\n"


def score_table(
    rows: Sequence[TranslationRow], domains: Sequence[str], unseen: Sequence[str], between: str = " / "
) -> tuple[list[str], list[list[str]]]:
    """Header and cells: BLEU and chrF per domain, their mean, unseen domains; `between` separates the two figures."""
    header = ["model", *domains, "mean", *(f"{name}{between}unseen" for name in unseen)]
    body = []
    for row in rows:
        scores = [*map(row.scores.get, domains), row.mean(domains), *map(row.scores.get, unseen)]
        body.append([row.name, *("-" if each is None else f"{each.bleu:.1f}{between}{each.chrf:.1f}" for each in scores)])
    return header, body


def said_of(counted: Compared) -> str:
    """How often either is better, in a line."""
    return (
        f"Pairs by sentence chrF of the mixture against the base's: higher {counted.better}, lower {counted.worse}, "
        f"the same {counted.same}."
    )


def _lines(examples: Sequence[TranslationExample]) -> list[list[str]]:
    """A line per kind of text, a column per example."""
    kinds = {"source": "source", "reference": "reference", "base": "base", "own expert": "own", "mixture": "mixture"}
    if all(each.own is None for each in examples):
        del kinds["own expert"]
    return [[title, *(getattr(each, kind) or "" for each in examples)] for title, kind in kinds.items()]


@dataclass(frozen=True)
class TranslationScore:
    """Of a model on a domain, both between 0 and 100: of the whole corpus, not means over its sentences."""

    bleu: Number
    chrf: Number


@dataclass(frozen=True)
class Signatures:
    """What sacrebleu computed, as papers quote it."""

    bleu: Label
    chrf: Label


def require_sacrebleu() -> None:
    """Raise ModekitError when the extra is not installed."""
    check_packages(("sacrebleu.metrics",), "pip install 'modekit[translation]'")


class Scorer:
    """sacrebleu's BLEU and chrF with its own defaults."""

    def __init__(self) -> None:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF

        self._bleu, self._chrf = BLEU(force=True), CHRF()  # force: no warning of text that looks tokenized

    @property
    def signatures(self) -> Signatures:
        """Of what was computed; something must have been."""
        return Signatures(str(self._bleu.get_signature()), str(self._chrf.get_signature()))

    def corpus(self, texts: Sequence[str], references: Sequence[str]) -> TranslationScore:
        """Of translations against one reference each."""
        found = [metric.corpus_score(list(texts), [list(references)]) for metric in (self._bleu, self._chrf)]
        return TranslationScore(*(float(each.score) for each in found))

    def sentence_chrf(self, text: str, reference: str) -> float:
        """Of one translation, between 0 and 100."""
        return float(self._chrf.sentence_score(text, [reference]).score)


SHOWN = 3
"""Examples of a domain."""
_LONGEST = 800  # characters of a text that are shown
ShownText = Annotated[str, Field(max_length=2_000)]
"""As much of a text as a page has room for."""


@dataclass(frozen=True)
class TranslationExample:
    """A pair and what was written of its source; `own` is the own expert's, None where there is none. Long texts are cut."""

    domain: Label
    source: ShownText
    reference: ShownText
    base: ShownText
    own: ShownText | None
    mixture: ShownText
    base_chrf: Number
    mixture_chrf: Number
    gain: Number


@dataclass(frozen=True)
class Compared:
    """On how many pairs of a domain the mixture's chrF is higher than the base's, lower, and the same."""

    better: Count
    worse: Count
    same: Count


def compared(
    scorer: Scorer, domain: str, pairs: Sequence[Pair], texts: Mapping[str, Sequence[str]]
) -> tuple[Compared, list[TranslationExample]]:
    """Sentence by sentence: `texts` are those of `base`, `mixture` and, where there is one, `own`, as the pairs are ordered."""
    base, mixture = (
        [scorer.sentence_chrf(text, pair.target) for text, pair in zip(texts[name], pairs, strict=True)]
        for name in ("base", "mixture")
    )
    gains = [of_mixture - of_base for of_base, of_mixture in zip(base, mixture, strict=True)]
    counted = Compared(sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains), sum(gain == 0 for gain in gains))
    own = texts.get("own")
    return counted, [
        TranslationExample(
            domain,
            _cut(pairs[row].source),
            _cut(pairs[row].target),
            _cut(texts["base"][row]),
            None if own is None else _cut(own[row]),
            _cut(texts["mixture"][row]),
            base[row],
            mixture[row],
            gains[row],
        )
        for row in _most_different(gains)
    ]


def _most_different(gains: Sequence[float]) -> list[int]:
    """Places of the best gain, the worst loss and what else differs most, from the best gain to the worst loss."""
    rows = sorted((row for row in range(len(gains)) if gains[row] != 0), key=lambda row: (-gains[row], row))
    ends = [*(row for row in rows[:1] if gains[row] > 0), *(row for row in rows[-1:] if gains[row] < 0)]
    by_size = sorted(rows, key=lambda row: (-abs(gains[row]), row))
    shown = list(dict.fromkeys([*ends, *by_size]))[:SHOWN]
    return [row for row in rows if row in shown]


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
