"""Real questions for `modekit eval-chat`: a .jsonl with a question and its domain per line, and sometimes an answer.

modekit ships some for seven domains (chat_questions.jsonl), which no fit reads. A domain's are asked where an expert's name has
the domain's name in it, `medicine-7b` say; the general ones where the base is an expert.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated

from pydantic import StringConstraints

from modekit.errors import TextError
from modekit.files.read import parse_json, read_text
from modekit.files.typed import Data, Label, as_kind
from modekit.recipes.recipe import Expert, place_of_base

GENERAL = "general"
"""The domain of questions that are the base's."""
_MOST_BYTES = 2**24
_ALIKE = {
    "medicine": {"medical", "med", "health", "clinical", "biomedical"},
    "law": {"legal"},
    "german": {"de", "deutsch"},
    "french": {"fr", "francais"},
    "code": {"coder", "coding", "python", "programming"},
    "science": {"scientific", "sciences"},
}
"""Other words for a domain in the name of an expert."""
_NOT_LETTERS = re.compile(r"[\W\d_]+")
_Said = Annotated[str, StringConstraints(min_length=1, max_length=4_000)]


class RealQuestion(Data):
    """A line of the file. `answer`: what is said before the next question, where a conversation changes its domain."""

    domain: Label
    question: _Said
    answer: _Said | None = None


def read_questions(file: Path | None) -> list[RealQuestion]:
    """The questions of a file, None: those that come with modekit. Raises TextError naming the line that is wrong."""
    shipped = files("modekit.evaluation").joinpath("chat_questions.jsonl")
    try:
        text = shipped.read_text(encoding="utf-8") if file is None else read_text(file, _MOST_BYTES)
    except (OSError, ValueError) as error:
        raise TextError("the questions cannot be read", where=f"--ask {file}", found=str(error)) from None
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            found.append(as_kind(parse_json(line), RealQuestion))
        except ValueError as error:
            raise TextError(
                "a line is no question",
                where=f"--ask {file}, line {number}",
                found=str(error),
                expected='{"domain": "law", "question": "...", "answer": "..."}; the answer may be left out',
            ) from None
    return found


def by_expert(questions: Sequence[RealQuestion], experts: Sequence[Expert]) -> Mapping[str, int]:
    """Domain of the questions -> place of the expert that they should go to, for domains that have one."""
    found = {domain: _place_of(domain, experts) for domain in dict.fromkeys(each.domain for each in questions)}
    return {domain: place for domain, place in found.items() if place is not None}


def _place_of(domain: str, experts: Sequence[Expert]) -> int | None:
    """An expert of this name, else the base for what is general, else the first one with the domain in its name."""
    named = next((place for place, expert in enumerate(experts) if expert.name == domain), None)
    if named is not None or domain == GENERAL:
        return place_of_base(experts) if named is None else named
    words = {domain.casefold(), *_ALIKE.get(domain, ())}
    for place, expert in enumerate(experts):
        if not expert.is_base and words & set(_NOT_LETTERS.split(expert.name.casefold())):
            return place
    return None
