"""The text that comes with modekit: four domains, general English, and one domain that no expert has seen.

Made by scripts/make_demo_text.py from WordNet glosses, open licences and the standard library; see text/NOTICE.
"""

from __future__ import annotations

import lzma
from importlib.resources import files
from pathlib import Path

from modekit.files.write import make_folder, write_file

DOMAINS = ("medicine", "law", "science", "code")
GENERAL = "general"
UNSEEN = "music"


def unpack_text(folder: Path) -> dict[str, Path]:
    """Write every domain's text as FOLDER/<domain>.jsonl, where it can be looked at; returns the paths."""
    make_folder(folder)
    shipped = files("modekit.demo") / "text"
    write_file(folder / "NOTICE", (shipped / "NOTICE").read_bytes())
    paths = {}
    for domain in (*DOMAINS, GENERAL, UNSEEN):
        paths[domain] = folder / f"{domain}.jsonl"
        if not paths[domain].exists():
            write_file(paths[domain], lzma.decompress((shipped / f"{domain}.jsonl.xz").read_bytes()))
    return paths
