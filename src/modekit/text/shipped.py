"""The text that comes with modekit, by name: a .jsonl of documents each. demo/text/NOTICE says whose it is."""

from __future__ import annotations

import json
import lzma
from importlib.resources import files

_FOLDER = files("modekit") / "demo" / "text"


def shipped_file(name: str) -> bytes:
    """A text as .jsonl."""
    return lzma.decompress((_FOLDER / f"{name}.jsonl.xz").read_bytes())


def shipped_documents(name: str) -> list[str]:
    """The documents of a text."""
    return [str(json.loads(line)["text"]) for line in shipped_file(name).splitlines()]


def shipped_notice() -> bytes:
    """Whose the texts are, and under which licences."""
    return (_FOLDER / "NOTICE").read_bytes()
