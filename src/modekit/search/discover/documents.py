"""Unlabelled documents, read twice: once for a bounded sample, once to be assigned to groups. Never all in memory.

Of every document 16 bytes of its digest are kept, to find duplicates.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from modekit.errors import TextError
from modekit.search.discover.words import READ
from modekit.text.document import Document, text_of
from modekit.text.documents import stream_documents
from modekit.text.splits import digest_of

WHERE = "--text"
_KEPT_DIGITS = 32  # of a digest


@dataclass(frozen=True)
class DocumentSample:
    """What the first reading found.

    Attributes:
        beginnings: of the documents to learn from, in an order that depends on their text alone.
        documents: how many there are in all, without duplicates.
        sha256: of all their digests in the order of reading.
    """

    beginnings: Sequence[str]
    documents: int
    sha256: str


class UnlabelledDocuments:
    """The documents of texts, as often as they are asked for."""

    def __init__(self, texts: Sequence[str], root: Path) -> None:
        self._texts, self._root = list(texts), root
        self.sha256 = ""
        """Of the digests that the last reading came upon, once it has ended."""

    def read(self) -> Iterator[tuple[str, Document]]:
        """Digest and document of each, duplicates once. Raises TextError where the text cannot be read."""
        seen: set[bytes] = set()
        together = hashlib.sha256()
        for document in stream_documents(self._texts, root=self._root, where=WHERE):
            digest = digest_of(document)
            key = bytes.fromhex(digest[:_KEPT_DIGITS])
            if key not in seen:
                seen.add(key)
                together.update(key)
                yield digest, document
        self.sha256 = together.hexdigest()

    def sample(self, most: int, seed: int) -> DocumentSample:
        """Read all and keep the beginnings of `most` documents that a hash chooses: the same ones in whatever order they come.

        Raises TextError where there is nothing, or a single document.
        """
        kept: list[tuple[int, str]] = []  # a heap: the largest hash, which is the first to go, stands in front
        count = 0
        for digest, document in self.read():
            count += 1
            rank = -int(hashlib.sha256(f"{seed} {digest}".encode()).hexdigest(), 16)
            if len(kept) < most:
                heapq.heappush(kept, (rank, text_of(document)[:READ]))
            elif rank > kept[0][0]:
                heapq.heapreplace(kept, (rank, text_of(document)[:READ]))
        if count < 2:
            raise TextError(
                "there is nothing to group" if count else "the text is empty",
                where=WHERE,
                found=f"{', '.join(self._texts)}: {count} document{'' if count == 1 else 's'}",
                expected="two documents or more",
                remedy="give more text: separate documents by blank lines, or write one record per document into a .jsonl",
            )
        return DocumentSample([beginning for _, beginning in sorted(kept, reverse=True)], count, self.sha256)

    def check_same(self, sample: DocumentSample) -> None:
        """Raise TextError when the reading that has just ended came upon other documents than the first."""
        if self.sha256 != sample.sha256:
            raise TextError(
                "the text changed while it was read",
                where=WHERE,
                found=", ".join(self._texts),
                remedy="run the command again when nobody writes there",
            )
