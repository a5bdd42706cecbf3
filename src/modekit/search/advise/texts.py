"""The text that advice may read: the select split, which is for choosing. The report split is for `modekit eval` alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modekit.errors import TextError
from modekit.recipes.recipe import Recipe
from modekit.search.advise.findings import Finding, finding_of
from modekit.text.documents import read_documents
from modekit.text.sequences import TokenSequence, encode
from modekit.text.splits import TRAINED_DIGITS, TRAINED_FILE, digest_of, digests_in, documents_of_split, text_record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEQUENCE_LENGTH = 512


@dataclass(frozen=True)
class Text:
    """Of one domain: select text to score, a record of it, and the documents that a router may be fitted on."""

    sequences: Sequence[TokenSequence]
    record: Mapping[str, Any]
    fit: Sequence[str]


def read_texts(
    recipe: Recipe, root: Path, folders: Sequence[Path], tokenizer: PreTrainedTokenizerBase, tokens: int
) -> tuple[dict[int, Text], list[Finding]]:
    """By place of the expert: its text, for experts that have some; and what is wrong with the others'.

    Documents are dropped that `modekit specialize` trained a model of `folders` on. Prompts set routers and are not scored.
    """
    trained = {digest for folder in folders for digest in digests_in(folder / TRAINED_FILE)}
    texts: dict[int, Text] = {}
    findings: list[Finding] = []
    for place, expert in enumerate(recipe.experts):
        if not expert.text and not expert.prompts:
            findings.append(
                Finding(
                    "warning",
                    expert.name,
                    "no text: what helps it is not known, and no router can be fitted for it",
                    to_do="add experts[].text; a few hundred documents are enough for advice",
                )
            )
            continue
        try:
            where = f"experts[{place}] '{expert.name}': text"
            documents = read_documents(expert.text, root=root, where=where) if expert.text else []
        except TextError as error:
            findings.append(finding_of(error, expert.name))
            continue
        chosen = [each for each in documents_of_split(documents, "select") if digest_of(each)[:TRAINED_DIGITS] not in trained]
        sequences = encode(tokenizer, chosen, max_tokens=tokens, sequence_length=SEQUENCE_LENGTH)
        count = sum(len(sequence.ids) for sequence in sequences)
        if count < tokens / 2:
            what = "little text to measure on" if sequences else "no text to measure on"
            findings.append(
                Finding(
                    "note",
                    expert.name,
                    what,
                    f"{count} of {tokens} tokens in the select split (one document in ten)",
                    "give more documents",
                )
            )
        fit = [*(expert.prompts or []), *documents_of_split(documents, "fit")]
        texts[place] = Text(sequences, {**text_record(chosen, count), "sequence_length": SEQUENCE_LENGTH}, fit)
    return texts, findings
