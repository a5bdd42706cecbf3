"""Pairs on which mixture and base differ most, side by side, and how often either is better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from modekit.evaluation.translation.scores import Scorer
from modekit.files.typed import Count, Label, Number
from modekit.text.document import Pair

SHOWN = 3
"""Examples of a domain."""
_LONGEST = 800  # characters of a text that are shown
ShownText = Annotated[str, Field(max_length=2_000)]
"""As much of a text as a page has room for."""


@dataclass(frozen=True)
class TranslationExample:
    """A pair and what was written of its source; `own` is the own expert's, None where there is none. Long texts are cut.

    `base_chrf` and `mixture_chrf` are of the sentence; `gain` is the second less the first.
    """

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
