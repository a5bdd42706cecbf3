"""The text that comes with modekit: four domains, general English, one domain that no expert has seen, and three languages.

Made by scripts/make_demo_text.py from WordNet glosses, open licences, the standard library and message catalogues; see
text/NOTICE.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from modekit.files.write import make_folder, write_file
from modekit.text.shipped import shipped_file, shipped_notice

DOMAINS = ("medicine", "law", "science", "code")
GENERAL = "general"
UNSEEN = "music"
LANGUAGES = ("english", "french", "german")
"""The same documents in each, by their `id`: messages of programs. With `code` they are the text of four languages."""


def unpack_text(folder: Path, names: Sequence[str] = (*DOMAINS, GENERAL, UNSEEN)) -> dict[str, Path]:
    """Write the text of each name as FOLDER/<name>.jsonl, where it can be looked at; returns the paths."""
    make_folder(folder)
    write_file(folder / "NOTICE", shipped_notice())
    paths = {}
    for domain in names:
        paths[domain] = folder / f"{domain}.jsonl"
        if not paths[domain].exists():
            write_file(paths[domain], shipped_file(domain))
    return paths
