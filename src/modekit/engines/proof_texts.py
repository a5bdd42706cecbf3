"""What a GGUF file with fewer bits is compared on: enough text that the loss of perplexity is no accident of a few sentences.

Where there is any, it is the mixture's held-out text, domain by domain in turn; else text that comes with modekit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

from transformers import PreTrainedTokenizerBase

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.errors import ModekitError
from modekit.evaluation.domains import recipe_texts
from modekit.text.document import Document
from modekit.text.sequences import encode
from modekit.text.shipped import shipped_documents

MOST_TOKENS = 4_000
"""Of all texts together."""
LONGEST = 128
"""Tokens of one text."""
FEWEST_TEXTS = 16
"""Of which a standard error says something."""
_SHIPPED = ("general", "code", "medicine", "german", "french")


@dataclass(frozen=True)
class ProofTexts:
    """Documents, and in words what they are."""

    name: str
    documents: Sequence[Document]

    def ids(self, tokenizer: PreTrainedTokenizerBase, longest: int) -> Iterator[list[int]]:
        """Their beginnings of at most `longest` tokens, until there are MOST_TOKENS; texts of a single token are left out.

        Raises TextError for a conversation that the tokenizer has no template for.
        """
        left = MOST_TOKENS
        length = min(longest, LONGEST)
        for document in self.documents:
            for sequence in encode(tokenizer, [document], max_tokens=min(left, length), sequence_length=length)[:1]:
                left -= len(sequence.ids)
                yield list(sequence.ids)
            if left < 2:
                return


def texts_of(checkpoint: Checkpoint) -> ProofTexts:
    """The held-out text of a mixture's domains, where it can be read; text that comes with modekit where that is little."""
    try:
        domains = {held.name: held.documents for held in recipe_texts(checkpoint).report() if held.documents}
    except ModekitError:  # whatever is wrong with a text, the weights can be compared on another
        domains = {}
    if not domains:
        return shipped_texts()
    own = _in_turn(f"held-out text of {', '.join(domains)}", domains.values())
    if len(own.documents) >= FEWEST_TEXTS:
        return own
    more = shipped_texts()
    return ProofTexts(f"{own.name}; {more.name}", [*own.documents, *more.documents])


def shipped_texts() -> ProofTexts:
    """Prose, code, and other languages."""
    return _in_turn("text that comes with modekit", map(shipped_documents, _SHIPPED))


def _in_turn(name: str, kinds: Iterable[Sequence[Document]]) -> ProofTexts:
    """One of each kind, then the next of each."""
    rounds = zip_longest(*(documents[:MOST_TOKENS] for documents in kinds))
    return ProofTexts(name, [document for document in chain.from_iterable(rounds) if document is not None])
