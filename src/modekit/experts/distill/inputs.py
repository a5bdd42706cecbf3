"""What a distillation reads: a student and its teacher on disk, of any size and family but with one tokenizer, and one text, or
several that share the steps.

None     shuffled together, so that a larger text has more of every step
equal    as many tokens of each in every step, short texts begun anew
turns    one text a step, in turn
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from modekit.errors import MismatchError, UnsupportedError
from modekit.experts.labelled import Reading, read_domain
from modekit.experts.specialist import digest_of_source
from modekit.loaded.load import load_tokenizer
from modekit.loaded.text_training import Training
from modekit.run import Run
from modekit.sources.pairs import PAIRS
from modekit.sources.source import ModelSource, open_source
from modekit.sources.tokenizer import Readers, check_ids_fit, check_same_tokenizer, read_tokens
from modekit.text.document import Document, check_kind
from modekit.text.sequences import TokenSequence
from modekit.training.batches import DomainSequences

_SPECIAL = ("bos_token_id", "eos_token_id", "unk_token_id")  # a pad never counts, whatever it is called
_READERS = Readers("student", "teacher", "use a teacher that has the student's tokenizer")


@dataclass(frozen=True)
class StudentAndTeacher:
    """Student and teacher by header, and the student's tokenizer, which both have."""

    student: ModelSource
    teacher: ModelSource
    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def vocabulary(self) -> int:
        """Logits that are compared: all, where both models have as many, else those of the tokenizer's ids.

        Embeddings are padded to round numbers of rows, of which no text has the ids.
        """
        ours, theirs = (_vocab_size(source.config) for source in (self.student, self.teacher))
        return ours if ours == theirs else max(self.tokenizer.get_vocab().values()) + 1

    @cached_property
    def teacher_digest(self) -> str:
        """Of the teacher's config and weights as they are now."""
        return digest_of_source(self.teacher)


def open_pair(student: Path, teacher: Path, *, run: Run) -> StudentAndTeacher:
    """Both by header. Raises SourceError, UnsupportedError (an encoder), MismatchError that says how tokenizers differ."""
    ours = open_source("STUDENT", student.name, student, run=run)
    theirs = open_source("--teacher", teacher.name, teacher, run=run)
    where = f"--teacher ({teacher.name})"
    tokenizer = load_tokenizer(student, run=run)
    check_same_tokenizer(student, teacher, where=where, readers=_READERS)
    _check_special(tokenizer, load_tokenizer(teacher, run=run), where)
    for source, label in ((ours, f"STUDENT ({student.name})"), (theirs, where)):
        if source.config["model_type"] in {family.model_type for family in PAIRS}:
            remedy = "leave --teacher away, and train it on text alone"
            raise UnsupportedError("models with an encoder are not distilled yet", where=label, remedy=remedy)
        check_ids_fit(read_tokens(source.folder, where=label), _vocab_size(source.config), where=label)
    return StudentAndTeacher(ours, theirs, tokenizer)


def digest_of_sequences(sequences: Sequence[TokenSequence]) -> str:
    """Of all ids, and of where documents are cut."""
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(f"{','.join(map(str, sequence.ids))}\n".encode())
    return digest.hexdigest()


def _check_special(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, where: str) -> None:
    """Raise MismatchError where special ids differ."""
    special = {name: (getattr(ours, name), getattr(theirs, name)) for name in _SPECIAL}
    different = [f"{name} {mine} (student), {its} (teacher)" for name, (mine, its) in special.items() if mine != its]
    if different:
        raise MismatchError(
            "the teacher's tokenizer has other special tokens than the student's",
            where=where,
            found="; ".join(different),
            expected="the same ids",
            remedy=_READERS.remedy,
        )


def _vocab_size(config: Mapping[str, Any]) -> int:
    """Rows of the embedding, by config; of a model with parts, that of its text."""
    inner = config.get("text_config")
    said = config.get("vocab_size") or (inner.get("vocab_size") if isinstance(inner, dict) else None)
    return said if isinstance(said, int) else 0


Mix = Literal["equal", "turns"]


@dataclass(frozen=True)
class Texts:
    """Documents that are learned from, the same in sequences by the texts that steps are shared out to, and sequences that are
    held out.
    """

    fit: list[Document]
    corpora: list[DomainSequences]
    held_out: list[TokenSequence]

    @property
    def sequences(self) -> list[TokenSequence]:
        """All that is learned from."""
        return [sequence for corpus in self.corpora for sequence in corpus.sequences]


def read_texts(
    texts: Sequence[str], root: Path, tokenizer: PreTrainedTokenizerBase, training: Training, mix: Mix | None
) -> Texts:
    """All texts as one, or one by one where steps are shared out between them. Raises TextError where one has nothing left."""
    found = Texts([], [], [])
    reading = Reading(tokenizer, root, training)
    for together in [list(texts)] if mix is None else [[text] for text in texts]:
        where = "--text" if mix is None else f"--text {together[0]}"
        documents, of_these, of_others = read_domain(None, together, reading, where=where)
        check_kind(documents, "text", where=where)
        found.fit.extend(documents)
        found.corpora.append(DomainSequences(where, len(found.corpora), of_these))
        found.held_out.extend(of_others.sequences)
    return found
