"""The tokens of a domain's text, of pairs those of the sources, kept: what a table of evidence is trained on.

They are the text itself in another spelling: whoever may not keep the text may not keep these. With them a domain is added
later without the others' text, and the fit is the one that all of it together gives.

Shape legend: N tokens of all sequences, V vocabulary.
"""

from __future__ import annotations

import base64
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from modekit.recipes.fits import MOST_TOKENS
from modekit.recipes.recipe import Expert
from modekit.routing.examples import Tokens, chats_of
from modekit.routing.fit import Fitting
from modekit.routing.kept import FitText, Get, Header, Provenance, checked, kept_or_text, load_kept, save_kept
from modekit.text.sequences import TokenSequence
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
            taken.append(TokenSequence(tuple(ids[:most].tolist())))
            most -= len(ids)
        return taken

    def save(self, path: Path) -> None:
        """Write atomically."""
        tensors, about = {"ids": self.ids_N, "lengths": self.lengths}, {"token_text": True, "source": self.source}
        if "chat" in self.source["how"]:
            tensors["starts"] = self.starts
        if self.expected_V is not None:
            tensors["expected"], about["expected"] = self.expected_V, True
        save_kept(path, tensors, about)


def load_token_text(path: Path, vocabulary: int) -> TokenText | None:
    """Read a domain's tokens; None when there are none, or only what another fit keeps. Raises CheckpointError when damaged."""

    def make(get: Get, about: Header) -> TokenText | None:
        if not about.get("token_text"):
            return None
        ids_N, lengths = checked(get("ids"), (None,)), checked(get("lengths"), (None,))
        starts = checked(get("starts"), (len(lengths),)) if "chat" in about["source"]["how"] else torch.zeros_like(lengths)
        if int(lengths.min()) < 1 or int(lengths.sum()) != len(ids_N) or not bool(((starts >= 0) & (starts < lengths)).all()):
            raise ValueError("the lengths are not those of the tokens")
        if not 0 <= int(ids_N.min()) <= int(ids_N.max()) < vocabulary:
            raise ValueError("tokens that the vocabulary does not have")
        expected_V = _counts(get("expected"), vocabulary) if about.get("expected") else None
        return TokenText(ids_N.int(), lengths.int(), starts.int(), about["source"], expected_V)

    return load_kept(path, make)


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


def read_token_texts(fitting: Fitting, tokenizer: PreTrainedTokenizerBase) -> list[TokenText]:
    """The tokens of every expert's text in the order of the experts, kept where text and settings are still the same.

    Raises TextError.
    """
    experts, texts, settings = fitting.recipe.experts, list[TokenText](), fitting.settings
    for place, expert in fitting.run.over("read tokens", enumerate(experts), len(experts)):
        path = fitting.statistics_file(expert.name)
        kept = load_token_text(path, fitting.checkpoint.vocabulary)
        how = {"sequence_length": settings.sequence_length, **chats_of(tokenizer, expert, settings)}
        text = kept_or_text(fitting, place, kept, how, tokenizer, MOST_TOKENS)
        if isinstance(text, FitText):
            text = _token_text(text, _expected(fitting, expert))
            text.save(path)
        texts.append(text)
    return texts


def _token_text(text: FitText, expected_V: torch.Tensor | None) -> TokenText:
    """Of pairs the tokens of the sources."""
    ids_N, lengths, starts = (
        torch.tensor(each, dtype=torch.int32)
        for each in (
            [token for sequence in text.sequences for token in sequence.ids],
            [len(sequence.ids) for sequence in text.sequences],
            [sequence.start for sequence in text.sequences],
        )
    )
    record = {**text.source["text"], "tokens": len(ids_N)}
    source = {"text": record, "sha256": record["sha256"], "how": text.source["how"]}
    return TokenText(ids_N, lengths, starts, source, expected_V)
