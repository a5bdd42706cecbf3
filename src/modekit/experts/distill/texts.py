"""What a student reads: one text, or several that share the steps.

None     shuffled together, so that a larger text has more of every step
equal    as many tokens of each in every step, short texts begun anew
turns    one text a step, in turn
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from modekit.experts.labelled import Reading, read_domain
from modekit.loaded.next_token import Training
from modekit.text.document import Document
from modekit.text.sequences import TokenSequence
from modekit.training.batches import Corpus, Draw, Part, plan_parts
from modekit.training.settings import TrainSettings

Mix = Literal["equal", "turns"]


@dataclass(frozen=True)
class Texts:
    """Documents that are learned from, the same in sequences, and sequences that are held out; `sizes`: how many sequences
    each text has that steps are shared out to.
    """

    fit: list[Document]
    sequences: list[TokenSequence]
    held_out: list[TokenSequence]
    sizes: tuple[int, ...]

    @property
    def all(self) -> list[TokenSequence]:
        """What the teacher is asked about, in the order in which its word is kept."""
        return [*self.sequences, *self.held_out]

    @property
    def corpus(self) -> Corpus:
        """What is learned from."""
        return Corpus("the text", 0, self.sequences)

    def parts(self, settings: TrainSettings, steps: int) -> list[Part]:
        """What every step reads, in terms of `corpus`."""
        starts = list(accumulate(self.sizes, initial=0))
        apart = [
            Corpus(f"text {number + 1}", number, self.sequences[start : start + size])
            for number, (start, size) in enumerate(zip(starts, self.sizes, strict=False))
        ]
        planned = plan_parts(apart, settings, steps=steps, experts=len(apart), parts=1, pack=False)
        return [
            Part([[Draw(0, starts[draw.corpus] + draw.sequence, 0) for draw in row] for row in part.rows], part.step_targets, 0)
            for part in planned
        ]


def read_texts(
    texts: Sequence[str], root: Path, tokenizer: PreTrainedTokenizerBase, training: Training, mix: Mix | None
) -> Texts:
    """All texts as one, or one by one where steps are shared out between them. Raises TextError where one has nothing left."""
    fit: list[Document] = []
    sequences: list[TokenSequence] = []
    held_out: list[TokenSequence] = []
    sizes: list[int] = []
    reading = Reading(tokenizer, root, training)
    for together in [list(texts)] if mix is None else [[text] for text in texts]:
        where = "--text" if mix is None else f"--text {together[0]}"
        documents, of_these, of_others = read_domain(None, together, reading, where=where)
        fit += documents
        sequences += of_these
        held_out += of_others.sequences
        sizes.append(len(of_these))
    return Texts(fit, sequences, held_out, tuple(sizes))
