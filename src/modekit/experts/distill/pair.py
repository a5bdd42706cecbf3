"""A student and its teacher on disk: of any size and family, but with one tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from modekit.errors import MismatchError
from modekit.experts.specialist_folder import digest_of_source
from modekit.loaded.load import load_tokenizer
from modekit.run import Run
from modekit.sources.model import ModelSource, open_source
from modekit.sources.tokenizer import Readers, check_ids_fit, check_same_tokenizer
from modekit.text.sequences import TokenSequence
from modekit.training.states_folder import digest_of_data

_SPECIAL = ("bos_token_id", "eos_token_id", "unk_token_id")  # a pad never counts, whatever it is called
_READERS = Readers("student", "teacher", "use a teacher that has the student's tokenizer", "")


@dataclass(frozen=True)
class Pair:
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
    def student_digest(self) -> str:
        """Of the student's config and weights as they are now."""
        return digest_of_source(self.student)

    @cached_property
    def teacher_digest(self) -> str:
        """Of the teacher's config and weights as they are now."""
        return digest_of_source(self.teacher)

    @cached_property
    def tokenizer_digest(self) -> str:
        """Of what every id stands for."""
        return digest_of_data(self.tokenizer.get_vocab())


def open_pair(student: Path, teacher: Path, *, run: Run) -> Pair:
    """Both by header. Raises SourceError, and MismatchError that names what differs between their tokenizers."""
    ours = open_source("STUDENT", student.name, student, run=run)
    theirs = open_source("--teacher", teacher.name, teacher, run=run)
    where = f"--teacher ({teacher.name})"
    tokenizer = load_tokenizer(student, run=run)
    its_own = load_tokenizer(teacher, run=run)
    check_same_tokenizer(student, teacher, where=where, readers=_READERS)
    _check_same(tokenizer, its_own, where)
    for source, label in ((ours, f"STUDENT ({student.name})"), (theirs, where)):
        check_ids_fit(source.folder, _vocab_size(source.config), where=label)
    return Pair(ours, theirs, tokenizer)


def digest_of_sequences(sequences: Sequence[TokenSequence]) -> str:
    """Of all ids, and of where documents are cut."""
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(f"{','.join(map(str, sequence.ids))}\n".encode())
    return digest.hexdigest()


def _check_same(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, where: str) -> None:
    """Raise MismatchError where tokens or special ids differ, whatever files they were read from."""
    if ours.get_vocab() != theirs.get_vocab():
        count = len(ours.get_vocab().items() ^ theirs.get_vocab().items())
        found = f"{len(ours.get_vocab())} tokens (student), {len(theirs.get_vocab())} (teacher), {count} entries that differ"
        raise MismatchError(
            "the teacher's tokenizer differs from the student's",
            where=where,
            found=found,
            expected="the same token for the same id",
            remedy=_READERS.remedy,
        )
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
