"""The table of `modekit eval-translation`: scores by sacrebleu, and how they are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from modekit.evaluation.results import Kind
from modekit.evaluation.results_folder import Result
from modekit.evaluation.tables import Cell, ResultTable
from modekit.files.figures import count_of
from modekit.files.typed import Count, Label, Number


@dataclass(frozen=True)
class Decoding:
    """Of all models alike: beams (1: greedy), sources that are translated together, and tokens of a translation at most."""

    beams: Count = 1
    batch: Count = 16
    max_new_tokens: Count = 256


@dataclass(frozen=True)
class TranslationScore:
    """Of a model on a domain, both between 0 and 100: of the whole corpus, not means over its sentences."""

    bleu: Number
    chrf: Number


@dataclass(frozen=True)
class TranslationRow:
    """One model."""

    name: Label
    kind: Kind
    total_parameters: Count
    active_parameters: Count
    scores: Annotated[Mapping[Label, TranslationScore], Field(alias="domains")]

    def mean(self, domains: Sequence[str]) -> TranslationScore | None:
        """The arithmetic mean of the domains' corpus scores; None unless all were scored, and there are some."""
        if not domains or any(domain not in self.scores for domain in domains):
            return None
        bleu, chrf = (sum(getattr(self.scores[domain], of) for domain in domains) / len(domains) for of in ("bleu", "chrf"))
        return TranslationScore(bleu, chrf)


@dataclass(frozen=True)
class TranslationResults(Result):
    """translate.json. `domains` have an expert and enter the means; `unseen` have none. `signature`: what sacrebleu computed,
    as papers quote it.
    """

    rows: Sequence[TranslationRow]
    domains: Sequence[Label]
    unseen: Sequence[Label]
    decoding: Decoding
    signature: Label

    file = "translate.json"
    command = "modekit eval-translation"

    def row(self, name: str) -> TranslationRow:
        """A row by its name."""
        return next(row for row in self.rows if row.name == name)

    def tables(self) -> list[ResultTable]:
        """BLEU and chrF per domain, their mean, unseen domains, and parameters."""
        unseen = [f"{name}\nunseen" for name in self.unseen]
        header = ["model", *self.domains, "mean", *unseen, "total\nactive"]
        body: list[list[str | Cell]] = []
        for row in self.rows:
            scores = [*map(row.scores.get, self.domains), row.mean(self.domains), *map(row.scores.get, self.unseen)]
            cells = ["-" if each is None else f"{each.bleu:.1f}\n{each.chrf:.1f}" for each in scores]
            body.append([row.name, *cells, f"{count_of(row.total_parameters)}\n{count_of(row.active_parameters)}"])
        way = "greedily" if self.decoding.beams == 1 else f"with {self.decoding.beams} beams"
        said = (
            f"BLEU and chrF of held-out sources, translated {way}, at most {self.decoding.max_new_tokens} tokens each: of a "
            f"domain's whole corpus, by sacrebleu ({self.signature})."
        )
        return [ResultTable("Translations", header, body, said)]
