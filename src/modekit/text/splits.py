"""The three splits: which documents set something, which choose, and which are shown.

A document belongs to exactly one split, decided by the hash of its own text, so that no text that set a router or
trained an expert is ever scored, whatever file it comes from and in whatever order:

    fit     80 %   router fits, specialists
    select  10 %   choosing between variants
    report  10 %   every number that is shown
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from modekit.errors import TextError
from modekit.files.read import LARGE, UNREADABLE, read_text
from modekit.text.document import Conversation, Document, text_of

Split = Literal["fit", "select", "report"]
TRAINED_FILE = "trained-on.txt"  # beside a specialist: digests of its documents, one per line
SELECTED_FILE = "selected-by.txt"  # beside a trained mixture: digests of documents that chose its state
TRAINED_DIGITS = 16  # of a digest, in both


def digest_of(document: Document) -> str:
    """sha256 of a document's text, surrounding white space aside."""
    return hashlib.sha256(text_of(document).strip().encode("utf-8", "surrogatepass")).hexdigest()


def mark_of(document: Document) -> str:
    """The beginning of a document's digest, by which trained-on.txt and selected-by.txt know it."""
    return digest_of(document)[:TRAINED_DIGITS]


def digests_in(path: Path) -> set[str]:
    """Digests that a file keeps, one per line; none without the file. Raises TextError when it cannot be read."""
    try:
        return set(read_text(path, LARGE).split())
    except FileNotFoundError:
        return set()
    except UNREADABLE as error:
        raise TextError(
            "the list of documents that a model was made from cannot be read",
            where=str(path),
            found=error,
            expected="digests, one per line",
            remedy="download the model again, or remove the file if its texts are others",
        ) from None


def split_of(document: Document) -> Split:
    """The split a document belongs to."""
    place = int(digest_of(document)[:8], 16) % 100
    return "fit" if place < 80 else "select" if place < 90 else "report"


def documents_of_split(documents: Iterable[Document], split: Split) -> list[Document]:
    """The documents that belong to one split."""
    return [document for document in documents if split_of(document) == split]


def text_record(documents: Sequence[Document], tokens: int) -> dict[str, object]:
    """What a result remembers of a text: how much, and a digest of the documents it used (conversations with their roles, pairs
    with their sides).
    """

    def whole(document: Document) -> str:
        if isinstance(document, str):
            return document
        parts = document.messages if isinstance(document, Conversation) else vars(document)
        return json.dumps(parts, ensure_ascii=False, sort_keys=True)

    together = hashlib.sha256("".join(digest_of(whole(document)) for document in documents).encode()).hexdigest()
    return {"documents": len(documents), "tokens": tokens, "sha256": together}
