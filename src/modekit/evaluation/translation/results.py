"""The table of `modekit eval-translation`: scores by sacrebleu, speed, and how they are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from pydantic import Field, JsonValue

from modekit.errors import check_packages
from modekit.evaluation.identity import ReadText
from modekit.evaluation.results import Kind
from modekit.evaluation.results_folder import CheckpointResult
from modekit.evaluation.tables import Cell, ResultTable
from modekit.evaluation.translation.decoding import Decoding
from modekit.files.figures import count_of, or_dash
from modekit.files.typed import Count, Label, Number


@dataclass(frozen=True)
class TranslationSettings(Decoding):
    """How all models wrote, how many pairs of a domain at most, and on which machine."""

    pairs: Count = field(kw_only=True)
    machine: str = field(kw_only=True)


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
        bleu, chrf = (sum(getattr(self.scores[domain], of) for domain in domains) / len(domains) for of in ("bleu", "chrf"))
        return TranslationScore(bleu, chrf)


@dataclass(frozen=True)
class TranslationResults(CheckpointResult):
    """translate.json. `domains` have an expert and enter the means; `unseen` have none."""

    rows: Sequence[TranslationRow]
    domains: Sequence[Label]
    unseen: Sequence[Label]
    settings: TranslationSettings
    signatures: Signatures
    text: Mapping[str, ReadText]

    file = "translate.json"
    command = "modekit eval-translation"

    def row(self, name: str) -> TranslationRow:
        """A row by its name."""
        return next(row for row in self.rows if row.name == name)

    def as_data(self) -> dict[str, JsonValue]:
        """Plain data for JSON, with the speed and the means that the table shows."""
        data: dict[str, Any] = super().as_data()
        for row, said in zip(self.rows, data["rows"], strict=True):
            mean = row.mean(self.domains)
            said |= {"tokens_per_second": row.tokens_per_second, "mean": None if mean is None else asdict(mean)}
        return data

    def tables(self) -> list[ResultTable]:
        """BLEU and chrF per domain, their mean, unseen domains, tokens per second, and parameters."""
        unseen = [f"{name}\nunseen" for name in self.unseen]
        header = ["model", *self.domains, "mean", *unseen, "tokens per second", "total\nactive"]
        body: list[list[str | Cell]] = []
        for row in self.rows:
            scores = [*map(row.scores.get, self.domains), row.mean(self.domains), *map(row.scores.get, self.unseen)]
            cells = ["-" if each is None else f"{each.bleu:.1f}\n{each.chrf:.1f}" for each in scores]
            size = f"{count_of(row.total_parameters)}\n{count_of(row.active_parameters)}"
            body.append([row.name, *cells, or_dash(row.tokens_per_second, ",.0f"), size])
        way = "greedily" if self.settings.beams == 1 else f"with {self.settings.beams} beams"
        said = (
            f"BLEU and chrF of held-out sources, translated {way}, at most {self.settings.max_new_tokens} tokens each: of a "
            f"domain's whole corpus, by sacrebleu ({self.signatures.bleu}; {self.signatures.chrf})."
        )
        return [ResultTable("Translations", header, body, said)]


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
