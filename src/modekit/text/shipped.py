"""The text that comes with modekit: documents by name (demo/text/NOTICE says whose they are), and short texts for fits.

A base model that is an expert takes small talk (routing/examples.py): text of a domain rarely has any, so that a router
fitted on documents alone finds its few words in some domain. Nothing of what `modekit eval-chat` says to a mixture is here.
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


SYSTEM_PROMPTS = (
    "",
    "You are a helpful assistant.",
    "You are a friendly and honest assistant who answers questions as well as you can.",
    "Answer briefly.",
    "Be concise. If you are not sure, say so.",
    "You are an expert. Think step by step and explain your reasoning.",
    "Today is Monday. The user writes from a phone.",
    "Use Markdown. Keep to the facts and name your sources where you can.",
    "Du bist ein hilfreicher Assistent.",
    "Tu es un assistant utile.",
    "Eres un asistente útil.",
)
"""Of no domain; the first one is none at all."""

SMALL_TALK = tuple(files("modekit.text").joinpath("small_talk.txt").read_text(encoding="utf-8").splitlines())
"""Of no domain: greetings, thanks, questions about the speaker, in several languages; a line of the file each."""
