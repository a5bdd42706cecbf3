"""The tokens of a domain's text, of pairs those of the sources, kept: what a table of evidence is trained on.

They are the text itself in another spelling: whoever may not keep the text may not keep these. With them a domain is added
later without the others' text, and the fit is the one that all of it together gives.

Shape legend: N tokens of all sequences.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel
from transformers import PreTrainedTokenizerBase

from modekit.files.typed import as_kind
from modekit.recipes.fits import MOST_TOKENS
from modekit.recipes.recipe import Expert
from modekit.routing.examples import Tokens, chats_of, read_examples
from modekit.routing.fit import Fitting
from modekit.routing.kept import Get, Header, Provenance, checked, documents_to_read, load_kept, save_kept
from modekit.text.sequences import TokenSequence, none_fits
from modekit.text.splits import text_record
from modekit.text.written import read_written, written_file


@dataclass(frozen=True)
class TokenText:
    """Of one domain.

    Attributes:
        ids_N: token ids of its sequences, one after the other, int32.
        lengths: tokens of each, int32.
        starts: tokens of each before the first that says something, int32.
        source: what they were made from: settings and a digest of the text.
        expected_V: of an expert that wrote its text, how often it expects each token where all experts read the same.
    """

    ids_N: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor
    source: Provenance
    expected_V: torch.Tensor | None = None

    def sequences(self) -> list[Tokens]:
        """Every sequence, and where it starts to say something."""
        return list(zip(torch.split(self.ids_N, self.lengths.tolist()), self.starts.tolist(), strict=True))

    def beginning(self, most: int) -> list[TokenSequence]:
        """Of its sequences at most so many tokens altogether."""
        taken: list[TokenSequence] = []
        for ids, _ in self.sequences():
            if most <= 0:
                break
            taken.append(TokenSequence(tuple(ids[:most].tolist()), 0))
            most -= len(ids)
        return taken

    def save(self, path: Path) -> None:
        """Write atomically."""
        starts = {"starts": self.starts} if "chat" in self.source["how"] else {}
        expected = {} if self.expected_V is None else {"expected": self.expected_V}
        tensors = {"ids": self.ids_N, "lengths": self.lengths, **starts, **expected}
        save_kept(path, tensors, {"token_text": True, "source": self.source, **({"expected": True} if expected else {})})


def load_token_text(path: Path, vocabulary: int) -> TokenText | None:
    """Read a domain's tokens; None when there are none, or only what another fit keeps. Raises CheckpointError when damaged."""

    def make(get: Get, about: Header) -> TokenText | None:
        if not about.get("token_text"):
            return None
        said = as_kind(about, _TokensHeader)
        ids_N, lengths = _tokens(get("ids"), get("lengths"), vocabulary)
        if not len(lengths):
            raise ValueError("there are no tokens")
        starts = checked(get("starts"), (len(lengths),)) if "chat" in said.source.get("how", {}) else torch.zeros_like(lengths)
        if int(starts.min()) < 0 or not bool((starts < lengths).all()):
            raise ValueError("texts that start behind their end")
        expected = _counts(get("expected"), vocabulary) if said.expected else None
        return TokenText(ids_N, lengths, starts.int(), said.source, expected)

    return load_kept(path, make)


class _TokensHeader(BaseModel):
    source: Provenance
    expected: bool = False


def _counts(counts_V: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Counts of tokens, float32. Raises ValueError for others, or of tokens that the vocabulary does not have."""
    checked(counts_V, (None,))
    if len(counts_V) > vocabulary or bool((counts_V < 0).any()):
        raise ValueError("counts that are not of the vocabulary's tokens")
    return counts_V.float()


def _expected(fitting: Fitting, expert: Expert) -> torch.Tensor | None:
    """What is known of an expert that wrote its text."""
    vocabulary = fitting.checkpoint.vocabulary
    known = read_written(written_file(expert, fitting.root)) if expert.writes_text else None
    with suppress(ValueError):  # a damaged record
        counts = bytearray(base64.b64decode(known.expected if known is not None else "", validate=True))
        return _counts(torch.frombuffer(counts, dtype=torch.float32)[:vocabulary], vocabulary) if counts else None
    return None


def _tokens(ids_N: torch.Tensor, lengths: torch.Tensor, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and lengths of sequences, int32. Raises ValueError where they do not belong together."""
    checked(ids_N, (None,))
    checked(lengths, (None,))
    if (len(lengths) and int(lengths.min()) < 1) or int(lengths.sum()) != len(ids_N):
        raise ValueError("the lengths are not those of the tokens")
    if len(ids_N) and not 0 <= int(ids_N.min()) <= int(ids_N.max()) < vocabulary:
        raise ValueError("tokens that the vocabulary does not have")
    return ids_N.int(), lengths.int()


def read_token_texts(fitting: Fitting, tokenizer: PreTrainedTokenizerBase) -> list[TokenText]:
    """The tokens of every expert's text in the order of the experts, kept where text and settings are still the same.

    Raises TextError.
    """
    experts, texts = fitting.recipe.experts, list[TokenText]()
    fitting.run.begin("read tokens", len(experts))
    for place in range(len(experts)):
        texts.append(_read(fitting, tokenizer, place))
        fitting.run.progress("read tokens", place + 1, len(experts))
    return texts


def _read(fitting: Fitting, tokenizer: PreTrainedTokenizerBase, place: int) -> TokenText:
    expert, settings = fitting.recipe.experts[place], fitting.settings
    path = fitting.statistics_file(expert.name)
    kept = load_token_text(path, fitting.checkpoint.vocabulary)
    how = {"sequence_length": settings.sequence_length, **chats_of(tokenizer, expert, settings)}
    documents = documents_to_read(fitting, place, None if kept is None else kept.source, how)
    if documents is None:
        assert kept is not None
        return kept
    record = text_record(documents, 0)
    said = {"sha256": record["sha256"], "how": how}
    if kept is not None and {key: kept.source.get(key) for key in said} == said:
        return kept
    sequences = read_examples(tokenizer, documents, expert, settings, most=MOST_TOKENS)
    if not sequences:
        raise none_fits(documents, settings.sequence_length, where=f"experts[{place}] '{expert.name}'")
    ids_N, lengths = _joined(sequences)
    starts = torch.tensor([sequence.start for sequence in sequences], dtype=torch.int32)
    source = {"text": {**record, "tokens": len(ids_N)}, **said}
    made = TokenText(ids_N, lengths, starts, source, _expected(fitting, expert))
    made.save(path)
    return made


def _joined(sequences: Sequence[TokenSequence]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of sequences, one after the other, and the tokens of each, int32."""
    ids = [each for sequence in sequences for each in sequence.ids]
    return torch.tensor(ids, dtype=torch.int32), torch.tensor([len(each.ids) for each in sequences], dtype=torch.int32)
