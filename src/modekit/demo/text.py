"""The text that comes with modekit: four domains, general English, one domain that no expert has seen, and three languages.

From WordNet glosses, open licences, the standard library and message catalogues; text/NOTICE says how it was made.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from modekit.files.write import make_folder, write_file
from modekit.text.shipped import SHIPPED_FOLDER, shipped_file

DOMAINS = ("medicine", "law", "science", "code")
GENERAL = "general"
UNSEEN = "music"
LANGUAGES = ("english", "french", "german")
"""The same documents in each, by their `id`: messages of programs. With `code` they are the text of four languages."""


def unpack_text(folder: Path, names: Sequence[str] = (*DOMAINS, GENERAL, UNSEEN)) -> dict[str, Path]:
    """Write the text of each name as FOLDER/<name>.jsonl, where it can be looked at; returns the paths."""
    make_folder(folder)
    write_file(folder / "NOTICE", (SHIPPED_FOLDER / "NOTICE").read_bytes())
    paths = {}
    for domain in names:
        paths[domain] = folder / f"{domain}.jsonl"
        if not paths[domain].exists():
            write_file(paths[domain], shipped_file(domain))
    return paths


CATALOGUES = {"oscar": "django_oscar", "trac": "trac", "wagtail": "wagtail", "localflavor": "django_localflavor"}
"""Domain -> the package whose messages it has: a shop, a tracker of bugs, a site of pages, names of places."""
UNSEEN_CATALOGUES = {"cms": "django_cms", "django": "django"}
"""Domains that no model is trained on; all other packages are general text."""
PAIRED = tuple(CATALOGUES)
UNSEEN_PAIRED = tuple(UNSEEN_CATALOGUES)
LONGEST = 160
"""Characters of a side: of pages of help a small model learns nothing."""
_MARKUP = re.compile(r"<[^>]{1,60}>")


def unpack_pairs(folder: Path) -> dict[str, Path]:
    """Write the pairs of each domain, of general text and of unseen domains as FOLDER/<name>.jsonl; returns the paths.

    A record has source, target, and the `id` of the document with the number of the line. A source is in a domain once,
    whatever its case; one that a domain or the general text has is in no unseen domain.
    """
    english, french = unpack_text(folder, ("english", "french")).values()
    named = {package: name for name, package in (CATALOGUES | UNSEEN_CATALOGUES).items()}
    found: dict[str, dict[str, dict[str, str]]] = {name: {} for name in (*PAIRED, GENERAL, *UNSEEN_PAIRED)}
    for record in aligned(_documents(english), _documents(french)):
        found[named.get(record["id"].partition("/")[0], GENERAL)].setdefault(record["source"].lower(), record)
    seen = {source for name in (*PAIRED, GENERAL) for source in found[name]}
    paths = {name: folder / f"{name}.jsonl" for name in found}
    for name, records in found.items():
        kept = [record for source, record in records.items() if name not in UNSEEN_PAIRED or source not in seen]
        if not paths[name].exists():
            lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
            write_file(paths[name], "".join(lines).encode())
    return paths


def aligned(english: Mapping[str, str], french: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Documents by their id, line by line: those of as many lines in both, less pairs with a side too long or no text."""
    for name, text in english.items():
        sides = [document.split("\n") for document in (text, french.get(name, ""))]
        if len(sides[0]) == len(sides[1]):
            for line, (source, target) in enumerate(zip(*(map(_plain, lines) for lines in sides), strict=True), 1):
                if all(3 <= len(side) <= LONGEST for side in (source, target)) and re.search(r"[a-zA-Z]{3}", source):
                    yield {"id": f"{name}:{line}", "source": source, "target": target}


def _documents(path: Path) -> dict[str, str]:
    """Text by its id."""
    records = map(json.loads, path.read_text(encoding="utf-8").strip().split("\n"))
    return {record["id"]: record["text"] for record in records}


def _plain(line: str) -> str:
    """Without markup and needless space."""
    return " ".join(_MARKUP.sub("", line).split())
