"""The text that advice may read: the select split, which is for choosing. The report split is for `modekit eval` alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modekit.errors import TextError
from modekit.recipes.recipe import Recipe
from modekit.search.advise.findings import Finding, finding_of
from modekit.text.document import Document
from modekit.text.held_out import RecipeTexts
from modekit.text.sequences import TokenSequence, encode
from modekit.text.splits import text_record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEQUENCE_LENGTH = 512


@dataclass(frozen=True)
class Text:
    """Of one domain: select text to score, a record of it, and the documents that a router may be fitted on."""

    sequences: Sequence[TokenSequence]
    record: Mapping[str, Any]
    fit: Sequence[Document]


def read_texts(
    recipe: Recipe, root: Path, folders: Sequence[Path], tokenizer: PreTrainedTokenizerBase, tokens: int
) -> tuple[dict[int, Text], list[Finding]]:
    """By place of the expert: its text, for experts that have some; and what is wrong with the others'.

    `folders` are those of the models; documents that `modekit specialize` trained one of them on are not scored, nor are
    prompts, which set routers.
    """
    own = RecipeTexts(recipe, root, models=folders)
    texts: dict[int, Text] = {}
    findings: list[Finding] = []
    for place, expert in enumerate(recipe.experts):
        if not expert.text and not expert.prompts:
            findings.append(_without_text(expert.name))
            continue
        try:
            text, fit = own.own(place), own.fit(place)
        except TextError as error:
            findings.append(finding_of(error, expert.name))
            continue
        chosen = own.select_of(text) if text is not None else []
        sequences = encode(tokenizer, chosen, max_tokens=tokens, sequence_length=SEQUENCE_LENGTH)
        count = sum(sequence.size for sequence in sequences)
        if count < tokens / 2:
            findings.append(_too_little(expert.name, count, tokens))
        texts[place] = Text(sequences, {**text_record(chosen, count), "sequence_length": SEQUENCE_LENGTH}, fit)
    return texts, findings


def _without_text(name: str) -> Finding:
    return Finding(
        "warning",
        name,
        "no text: what helps it is not known, and no router can be fitted for it",
        to_do="add experts[].text; a few hundred documents are enough for advice",
    )


def _too_little(name: str, count: int, tokens: int) -> Finding:
    what = "little text to measure on" if count else "no text to measure on"
    return Finding(
        "note", name, what, f"{count} of {tokens} tokens in the select split (one document in ten)", "give more documents"
    )
