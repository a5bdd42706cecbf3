"""BLEU and chrF as sacrebleu computes them: what is said here of them is what it says."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass

from modekit.errors import ModekitError
from modekit.files.typed import Label, Number


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


def require_sacrebleu(where: str = "modekit eval-translation") -> None:
    """Raise ModekitError when the extra is not installed; `where` says what needs it."""
    try:
        importlib.import_module("sacrebleu.metrics")
    except ImportError as error:
        raise ModekitError(
            "translations are scored by sacrebleu, which is not installed",
            where=where,
            found=error,
            expected="sacrebleu 2.4 or later",
            remedy="pip install 'modekit[translation]'",
        ) from None


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
