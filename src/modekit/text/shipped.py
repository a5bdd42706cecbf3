"""The text that comes with modekit: documents by name (demo/text/NOTICE says whose they are), and short texts for fits.

A base model that is an expert takes small talk (routing/examples.py): text of a domain rarely has any, so that a router
fitted on documents alone finds its few words in some domain. Likewise a question that is cut from a document shows a router
"fever" and never "What is ...?": put around terms of every domain's own documents, words of asking are as likely in each.
"""

from __future__ import annotations

import json
import lzma
import random
import re
from collections.abc import Sequence
from importlib.resources import files

SHIPPED_FOLDER = files("modekit") / "demo" / "text"


def shipped_file(name: str) -> bytes:
    """A text as .jsonl."""
    return lzma.decompress((SHIPPED_FOLDER / f"{name}.jsonl.xz").read_bytes())


def shipped_documents(name: str) -> list[str]:
    """The documents of a text."""
    return [str(json.loads(line)["text"]) for line in shipped_file(name).splitlines()]


def _lines_of(name: str) -> tuple[str, ...]:
    return tuple(files("modekit.text").joinpath(name).read_text(encoding="utf-8").splitlines())


def _by_language(name: str) -> dict[str, list[str]]:
    frames: dict[str, list[str]] = {}
    for line in _lines_of(name):
        language, _, frame = line.partition("\t")
        frames.setdefault(language, []).append(frame)
    return frames


SYSTEM_PROMPTS = _lines_of("system_prompts.txt")
"""Of no domain; the first one is none at all."""
SMALL_TALK = _lines_of("small_talk.txt")
"""Of no domain: greetings, thanks, questions about the speaker, in several languages; a line of the file each."""

ENGLISH = "en"
"""The language of templates and of their system prompts."""
_TERM = "{}"
_WORD = re.compile(r"[^\W\d_][\w'\u2019-]*")
_SHORTEST, _LONGEST = 4, 2  # letters of the first word of a term, words of a term
_WINDOW = 400  # characters of a document in which a term is looked for
_LOOK_AT = 200, 1_000  # documents, and characters of each, that show a language
QUESTION_FRAMES = _by_language("question_frames.txt")
"""Language -> frames; each {} is a term."""
POLITE_FRAMES = _by_language("polite_frames.txt")
"""Language -> greetings and thanks; {} is what the user says."""
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
