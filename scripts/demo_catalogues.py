"""The same documents in English, French and German, out of message catalogues that are translated under open licences.

    wheels -> catalogues (.mo in French and in German) -> messages that both have -> documents of one catalogue, by the same id

The English text of a message is its key. A document is a run of a catalogue's messages in the order of their keys, so that
messages which are nearly the same stand in one document, and thus in one split.
"""

from __future__ import annotations

import gettext
import io
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

LANGUAGES = ("english", "french", "german")
SHORTEST = 14  # characters of a message in English
TARGET_CHARS = 620  # of a document in English: 60 to 300 words in all three
_CATALOGUE = re.compile(r"(?P<before>.*/)(?P<language>fr|de)(?P<country>_FR|_DE)?/LC_MESSAGES/(?P<name>[^/]+)\.mo")
_LICENCE = re.compile(r"[^/]+\.dist-info/(licenses/)?(LICENSE|COPYING)(\.md|\.rst|\.txt)?")


@dataclass(frozen=True)
class Document:
    """One document in three languages, in the order of LANGUAGES."""

    id: str
    texts: tuple[str, str, str]


def parallel_documents(wheels: Sequence[Path], new: Callable[[str], bool]) -> list[Document]:
    """Every document of every catalogue that is there in French and German; `new` says whether a message is new enough."""
    found = []
    for wheel in sorted(wheels, key=lambda path: path.name.lower()):
        for catalogue, messages in _catalogues(wheel):
            package = wheel.name.split("-")[0].lower()
            runs = _runs([each for each in messages if new(each[0])])
            found += [Document(f"{package}/{catalogue}/{number}", _joined(run)) for number, run in enumerate(runs, 1)]
    return found


def licences(wheels: Sequence[Path]) -> str:
    """Name, version and licence of every package, as its wheel has them."""
    parts = []
    for wheel in sorted(wheels, key=lambda path: path.name.lower()):
        with zipfile.ZipFile(wheel) as archive:
            (file,) = [name for name in archive.namelist() if _LICENCE.fullmatch(name)]
            text = archive.read(file).decode("utf-8").strip()
        name, version = wheel.name.split("-")[:2]
        parts.append(f"{name} {version}\n\n{text}")
    return "\n\n".join(parts)


def _catalogues(wheel: Path) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """Name of each catalogue, and its messages (English, French, German) by key."""
    files: dict[str, dict[str, str]] = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):  # fr before fr_FR: the plain one is taken where there are both
            if parts := _CATALOGUE.fullmatch(name):
                section = re.sub(r"/?(locale|translations)/$", "", parts["before"])
                files.setdefault(f"{section}/{parts['name']}", {}).setdefault(parts["language"], name)
        for catalogue, by_language in sorted(files.items()):
            if by_language.keys() == {"fr", "de"}:
                french, german = (_messages(archive.read(by_language[language])) for language in ("fr", "de"))
                both = sorted(key for key in french if key in german and _is_translated(key, french[key], german[key]))
                yield catalogue, [(_english(key), french[key].strip(), german[key].strip()) for key in both]


def _messages(data: bytes) -> dict[str, str]:
    """Key -> translation of messages without a plural (their key holds the English singular alone)."""
    catalog = gettext.GNUTranslations(io.BytesIO(data))._catalog  # type: ignore[attr-defined]  # the only way to list it
    return {key: text for key, text in catalog.items() if isinstance(key, str) and key and isinstance(text, str)}


def _english(key: str) -> str:
    """A key without its context."""
    return key.rpartition("\x04")[2].strip()


def _is_translated(key: str, french: str, german: str) -> bool:
    english = _english(key)
    return len(english) >= SHORTEST and len({english, french.strip(), german.strip()}) == 3


def _runs(messages: Sequence[tuple[str, str, str]]) -> Iterator[list[tuple[str, str, str]]]:
    """Neighbouring messages until there are characters enough; what is left at the end joins nothing and is dropped."""
    run: list[tuple[str, str, str]] = []
    for message in messages:
        run.append(message)
        if sum(len(english) for english, _, _ in run) >= TARGET_CHARS:
            yield run
            run = []


def _joined(run: Sequence[tuple[str, str, str]]) -> tuple[str, str, str]:
    english, french, german = ("\n".join(texts) for texts in zip(*run, strict=True))
    return english, french, german
