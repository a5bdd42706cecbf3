"""The text that comes with modekit: documents by name (demo/text/NOTICE says whose they are), and short texts for fits.

A base model that is an expert takes small talk (routing/examples.py): text of a domain rarely has any, so that a router
fitted on documents alone finds its few words in some domain.
"""

from __future__ import annotations

import json
import lzma
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


SYSTEM_PROMPTS = _lines_of("system_prompts.txt")
"""Of no domain; the first one is none at all."""
SMALL_TALK = _lines_of("small_talk.txt")
"""Of no domain: greetings, thanks, questions about the speaker, in several languages; a line of the file each."""
