"""Words of asking around a term: what questions of all domains have in common, and so must weigh nothing.

A question that is cut from a document shows a router "fever" and never "What is ...?". Put around terms of every domain's own
documents, words of asking are as likely in each. question_frames.txt has them, a language and a frame per line.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.resources import files

ENGLISH = "en"
"""The language of templates and of their system prompts."""
_TERM = "{}"
_WORD = re.compile(r"[^\W\d_][\w'\u2019-]*")
_SHORTEST = 4  # letters of the first word of a term
_LONGEST = 2  # words of a term
_WINDOW = 400  # characters of a document in which a term is looked for
_LOOK_AT = 200, 1_000  # documents, and characters of each, that show a language


def _read() -> Mapping[str, Sequence[str]]:
    lines = files("modekit.text").joinpath("question_frames.txt").read_text(encoding="utf-8").splitlines()
    found: dict[str, list[str]] = defaultdict(list)
    for language, frame in (line.split("\t") for line in lines):
        found[language].append(frame)
    return found


QUESTION_FRAMES = _read()
"""Language -> frames; each {} is a term."""
_WORDS = {
    language: {word.lower() for frame in frames for word in _WORD.findall(frame)}
    for language, frames in QUESTION_FRAMES.items()
}
_OF_ANY = frozenset().union(*_WORDS.values())


def language_of(documents: Sequence[str]) -> str:
    """The language whose words of asking are most frequent in the documents; English where none is."""
    most, length = _LOOK_AT
    words = [word for text in documents[:most] for word in _WORD.findall(text[:length].lower())]
    return max((ENGLISH, *_WORDS), key=lambda language: sum(word in _WORDS[language] for word in words))


def framed_question(document: str, frames: Sequence[str], draw: random.Random) -> str | None:
    """A question with terms of the document; None where it has no term."""
    frame = draw.choice(frames)
    terms = [_term(document, draw) for _ in range(frame.count(_TERM))]
    return None if None in terms else frame.format(*terms)


def _term(document: str, draw: random.Random) -> str | None:
    """A word that is none of asking, and perhaps the word behind it."""
    place = draw.randrange(max(1, len(document) - _WINDOW // 2))
    words = _WORD.findall(document[place : place + _WINDOW])[1:]  # the first may be half of one
    starts = [at for at, word in enumerate(words) if len(word) >= _SHORTEST and word.lower() not in _OF_ANY]
    if not starts:
        return None
    start = draw.choice(starts)
    return " ".join(words[start : start + draw.randint(1, _LONGEST)])
