"""What translate.json has to hold, so that a page of it can be drawn."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from modekit.evaluation.results import MOST_CELLS, Kind
from modekit.files.typed import Count, Data, Label, Number

_LONGEST = 2_000  # characters of a text, of which as many are written as a page has room for


class Scores(Data):
    """Of a model on a domain, or their mean."""

    bleu: Number
    chrf: Number


class TranslatedRow(Data):
    """One model."""

    name: Label
    kind: Kind
    total_parameters: Count
    active_parameters: Count
    tokens_per_second: Number | None
    domains: dict[Label, Scores]
    mean: Scores | None


class Settings(Data):
    """How all models wrote."""

    beams: Count
    batch: Count
    max_new_tokens: Count


class Signatures(Data):
    """What sacrebleu computed."""

    bleu: Label
    chrf: Label


class Differences(Data):
    """On how many pairs of a domain the mixture is better than the base, worse, and the same."""

    better: Count
    worse: Count
    same: Count


class Example(Data):
    """A pair side by side."""

    domain: Label
    source: str = Field(max_length=_LONGEST)
    reference: str = Field(max_length=_LONGEST)
    base: str = Field(max_length=_LONGEST)
    own: str | None = Field(max_length=_LONGEST)
    mixture: str = Field(max_length=_LONGEST)
    base_chrf: Number
    mixture_chrf: Number
    gain: Number


class Translations(Data):
    """translate.json."""

    format: Literal[1]
    checkpoint: dict[str, str]
    settings: Settings
    signatures: Signatures
    rows: list[TranslatedRow] = Field(max_length=2**10)
    domains: list[Label]
    unseen: list[Label]
    differences: dict[Label, Differences]
    examples: list[Example] = Field(max_length=2**10)
    notes: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _is_a_table(self) -> Translations:
        if len(self.rows) * (1 + len(self.domains) + len(self.unseen)) > MOST_CELLS:
            raise ValueError(f"a table of more than {MOST_CELLS:,} cells")
        return self
