"""Parallel text by domain for translation.py: a synthetic corpus, and messages of programs in English and French.

Records of `source` and `target` in a .jsonl per domain, as modekit reads them; what is held out is decided by modekit's own
split of documents.
"""

from __future__ import annotations

import gettext
import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from modekit.demo.text import unpack_text
from modekit.text.document import Pair
from modekit.text.documents import read_documents
from modekit.text.splits import Split, documents_of_split

GENERIC = "generic"


@dataclass(frozen=True)
class Corpus:
    """Domain -> its file; `generic` is text of no domain."""

    seen: Mapping[str, Path]
    unseen: Mapping[str, Path]
    generic: Path

    def pairs(self, domain: str, split: Split) -> list[Pair]:
        """Pairs of a domain, or of the generic text, in one split."""
        path = {**self.seen, **self.unseen, GENERIC: self.generic}[domain]
        documents = read_documents([str(path)], root=path.parent, where=domain)
        return [pair for pair in documents_of_split(documents, split) if isinstance(pair, Pair)]


# The synthetic corpus: one draw of words for all seeds, so that seeds differ by models alone.

SEEN, UNSEEN = ("mill", "port", "farm", "court", "clinic"), ("mine", "studio")
PLAIN, OWN, AMBIGUOUS, CUES = 240, 30, 60, 3
"""Words of all domains, of each unseen domain alone, whose translation depends on the domain, and cues of each domain."""
SHARE_AMBIGUOUS, SHARE_OWN, SHARE_CUE = 0.3, 0.4, 0.7
LENGTHS = range(4, 13)


class Language:
    """300 words with one translation, 60 with one per domain, and cues; a describing word comes after what it describes."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(f"language {seed}")
        source, target = self._words("bdfgklmnprst", "aeiou"), self._words("vzjhcqwx", "aeiouy")
        self.plain = [next(source) for _ in range(PLAIN)]
        self.own = {name: [next(source) for _ in range(OWN)] for name in UNSEEN}
        self.ambiguous = [next(source) for _ in range(AMBIGUOUS)]
        self.cues = {name: [next(source) for _ in range(CUES)] for name in (*SEEN, *UNSEEN)}
        every = [*self.plain, *(word for own in self.own.values() for word in own)]
        self.describing = set(every[::3])
        cues = [word for each in self.cues.values() for word in each]
        self._one = {word: next(target) for word in [*every, *cues]}
        self._senses = {name: {word: next(target) for word in self.ambiguous} for name in SEEN}
        for name in UNSEEN:  # every word in the sense of one of the others
            self._senses[name] = {word: self._senses[self._random.choice(SEEN)][word] for word in self.ambiguous}

    def _words(self, consonants: str, vowels: str) -> Iterator[str]:
        made = [a + b + c + d for a in consonants for b in vowels for c in consonants for d in vowels]
        return iter(self._random.sample(made, len(made)))

    @property
    def words(self) -> list[str]:
        """Of both sides, each once."""
        senses = (word for each in self._senses.values() for word in each.values())
        return list(dict.fromkeys([*self._one, *self.ambiguous, *self._one.values(), *senses]))

    def pair(self, domain: str, draw: random.Random) -> tuple[str, str]:
        """A sentence and its translation. Generic ones are of a seen domain, drawn anew, with the words of all."""
        words = self.plain + [word for own in self.own.values() for word in own] if domain == GENERIC else self.plain
        own = self.own.get(domain, [])
        domain = draw.choice(SEEN) if domain == GENERIC else domain
        source = []
        for _ in range(draw.choice(LENGTHS)):
            kind = draw.random()
            if kind < SHARE_AMBIGUOUS:
                source.append(draw.choice(self.ambiguous))
            else:
                source.append(draw.choice(own if own and draw.random() < SHARE_OWN else words))
        if draw.random() < SHARE_CUE:
            source[draw.randrange(len(source))] = draw.choice(self.cues[domain])
        return " ".join(source), " ".join(self._translated(source, domain))

    def _translated(self, source: Sequence[str], domain: str) -> Iterator[str]:
        held = None
        for word in source:
            said = self._senses[domain].get(word) or self._one[word]
            if word in self.describing and held is None:
                held = said
                continue
            yield said
            if held is not None:
                yield held
                held = None
        if held is not None:
            yield held


def synthetic(folder: Path, *, pairs: int, generic: int) -> tuple[Corpus, Language]:
    """So many pairs per domain, and of the generic text."""
    language = Language()
    paths = {name: folder / f"{name}.jsonl" for name in (*SEEN, *UNSEEN, GENERIC)}
    for name, path in paths.items():
        draw = random.Random(f"text of {name}")
        _write(path, (language.pair(name, draw) for _ in range(generic if name == GENERIC else pairs)))
    return _corpus(paths, SEEN, UNSEEN), language


# Messages of programs, from the message catalogues of a Debian with postgresql-15, libc6 and gtk2.

CATALOGUES = {
    "postgres": ["postgres-15"],
    "psql": ["psql-15"],
    "libc": ["libc"],
    "gtk": ["gtk20"],
    "gtk-properties": ["gtk20-properties"],
}
UNSEEN_CATALOGUES = {
    "pg-tools": [
        *(f"pg_{name}-15" for name in ("amcheck", "archivecleanup", "basebackup", "checksums", "config", "controldata", "ctl")),
        *(f"pg_{name}-15" for name in ("dump", "resetwal", "rewind", "upgrade", "verifybackup", "waldump")),
        "initdb-15",
        "pgscripts-15",
        "plpgsql-15",
    ],
    "python-apt": ["python-apt"],
}
LONGEST = 160
"""Characters of a side: catalogues have whole pages of help, of which a small model learns nothing."""
LOCALE = Path("/usr/share/locale/fr/LC_MESSAGES")


def catalogues(folder: Path) -> Corpus:
    """English -> French by catalogue. Generic text is the demo's: neighbouring messages of web programs, line by line.

    Of an unseen catalogue, what a seen one or the generic text says, too, is left out. Raises SystemExit where catalogues lack.
    """
    named = {**CATALOGUES, **UNSEEN_CATALOGUES}
    lacking = [each for names in named.values() for each in names if not (LOCALE / f"{each}.mo").exists()]
    if lacking:
        raise SystemExit(
            f"translation.py real: {LOCALE} has no {', '.join(lacking)}: install postgresql-15, postgresql-client-15, "
            "libgtk2.0-common and python-apt-common on a Debian 12 that keeps its locales, or run the synthetic part"
        )
    texts = {name: dict(pair for each in names for pair in messages(LOCALE / f"{each}.mo")) for name, names in named.items()}
    texts[GENERIC] = dict(web_messages(folder))
    known = {source.lower() for name in (*CATALOGUES, GENERIC) for source in texts[name]}
    for name in UNSEEN_CATALOGUES:
        texts[name] = {source: target for source, target in texts[name].items() if source.lower() not in known}
    paths = {name: folder / f"{name}.jsonl" for name in texts}
    for name, path in paths.items():
        _write(path, texts[name].items())
    return _corpus(paths, CATALOGUES, UNSEEN_CATALOGUES)


def messages(path: Path) -> Iterator[tuple[str, str]]:
    """Messages of a catalogue that are one line each, without markup, the marks of accelerators, plurals and contexts."""
    with path.open("rb") as file:
        read = gettext.GNUTranslations(file)
    catalogue: dict[str | tuple[str, int], str] = read._catalog  # type: ignore[attr-defined]
    for source, target in catalogue.items():
        if isinstance(source, str) and "\x04" not in source:
            yield from _kept(source, target)


def web_messages(folder: Path) -> Iterator[tuple[str, str]]:
    """Of the demo's documents in English and French those of as many lines, line by line."""
    paths = unpack_text(folder / "demo", ("english", "french"))
    sides = [{record["id"]: record["text"] for record in map(json.loads, path.open())} for path in paths.values()]
    for name, english in sides[0].items():
        lines = [english.split("\n"), sides[1][name].split("\n")]
        if len(lines[0]) == len(lines[1]):
            for source, target in zip(*lines, strict=True):
                yield from _kept(source, target)


def _kept(source: str, target: str) -> Iterator[tuple[str, str]]:
    """A message and its translation without what is no text, unless one is too long or nothing is left of it."""
    sides = [" ".join(re.sub(r"<[^>]{1,60}>|(?<=\b)_(?=\w)|^_(?=\w)", "", side).split()) for side in (source, target)]
    if all(3 <= len(side) <= LONGEST for side in sides) and re.search(r"[a-zA-Z]{3}", sides[0]):
        yield sides[0], sides[1]


def _corpus(paths: Mapping[str, Path], seen: Iterable[str], unseen: Iterable[str]) -> Corpus:
    return Corpus({name: paths[name] for name in seen}, {name: paths[name] for name in unseen}, paths[GENERIC])


def _write(path: Path, pairs: Iterable[tuple[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"source": source, "target": target}, ensure_ascii=False) + "\n" for source, target in pairs]
    path.write_text("".join(lines), encoding="utf-8")
