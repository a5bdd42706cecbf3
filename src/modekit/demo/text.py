"""The text that comes with modekit: four domains, general English, and one domain that no expert has seen.

Made by scripts/make_demo_text.py from WordNet glosses, open licences and the standard library; see text/NOTICE.
"""

from __future__ import annotations

import lzma
from importlib.resources import files
from pathlib import Path

from modekit.files.staging import write_atomically

DOMAINS = ("medicine", "law", "science", "code")
GENERAL = "general"
UNSEEN = "music"


def unpack_text(folder: Path) -> dict[str, Path]:
    """Write every domain's text as FOLDER/<domain>.jsonl, where it can be looked at; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    shipped = files("modekit.demo") / "text"
    (folder / "NOTICE").write_bytes((shipped / "NOTICE").read_bytes())
    paths = {}
    for domain in (*DOMAINS, GENERAL, UNSEEN):
        paths[domain] = folder / f"{domain}.jsonl"
        if not paths[domain].exists():
            write_atomically(paths[domain], lzma.decompress((shipped / f"{domain}.jsonl.xz").read_bytes()))
    return paths
