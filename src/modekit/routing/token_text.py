"""The tokens of a domain's text, of pairs those of the sources, kept: what a table of evidence is trained on.

They are the text itself in another spelling: whoever may not keep the text may not keep these. With them a domain is added
later without the others' text, and the fit is the one that all of it together gives.

Shape legend: N tokens of all sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from modekit.errors import TextError
from modekit.files.typed import as_kind
from modekit.recipes.fits import MOST_TOKENS
from modekit.recipes.recipe import Expert
from modekit.recipes.router import Router
from modekit.routing.examples import Tokens, chats_of, read_examples, without_text
from modekit.routing.fitting import Fitting
from modekit.routing.kept import Get, checked, load_kept, save_kept
from modekit.text.document import Document
from modekit.text.held_out import RecipeTexts, fit_documents
from modekit.text.sequences import TokenSequence, encode, none_fits
from modekit.text.splits import text_record


@dataclass(frozen=True)
class TokenText:
    """Of one domain.

    Attributes:
        ids_N: token ids of its sequences, one after the other, int32.
        lengths: tokens of each, int32.
        starts: tokens of each before the first that says something, int32.
        source: what they were made from: settings and a digest of the text.
        held_N, held_lengths: the same of documents that may choose (the select split), where the fit chooses.
    """

    ids_N: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor
    source: dict[str, Any]
    held_N: torch.Tensor | None = None
    held_lengths: torch.Tensor | None = None

    def sequences(self) -> list[Tokens]:
        """Every sequence, and where it starts to say something."""
        return list(zip(torch.split(self.ids_N, self.lengths.tolist()), self.starts.tolist(), strict=True))

    def held_out(self) -> list[Tokens]:
        """Every sequence of the documents that may choose."""
        if self.held_N is None or self.held_lengths is None:
            return []
        return [(ids, 0) for ids in torch.split(self.held_N, self.held_lengths.tolist())]

    @property
    def chooses(self) -> bool:
        """Whether documents that may choose were looked for."""
        return self.held_N is not None

    def save(self, path: Path) -> None:
        """Write atomically."""
        starts = {"starts": self.starts} if "chat" in self.source["how"] else {}
        held = {}
        if self.held_N is not None and self.held_lengths is not None:
            held = {"held_ids": self.held_N, "held_lengths": self.held_lengths}
        tensors = {"ids": self.ids_N, "lengths": self.lengths, **starts, **held}
        save_kept(path, tensors, {"token_text": True, "source": self.source, **({"held_out": True} if held else {})})


def load_token_text(path: Path, vocabulary: int) -> TokenText | None:
    """Read a domain's tokens; None when there are none, or only what another fit keeps. Raises CheckpointError when damaged."""

    def make(get: Get, about: dict[str, Any]) -> TokenText | None:
        if not about.get("token_text"):
            return None
        said = as_kind(about, _About)
        ids_N, lengths = _tokens(get("ids"), get("lengths"), vocabulary)
        if not len(lengths):
            raise ValueError("there are no tokens")
        held = _tokens(get("held_ids"), get("held_lengths"), vocabulary) if said.held_out else (None, None)
        starts = checked(get("starts"), (len(lengths),)) if "chat" in said.source.get("how", {}) else torch.zeros_like(lengths)
        if int(starts.min()) < 0 or not bool((starts < lengths).all()):
            raise ValueError("texts that start behind their end")
        return TokenText(ids_N, lengths, starts.int(), said.source, *held)

    return load_kept(path, make)


class _About(BaseModel):
    source: dict[str, Any]
    held_out: bool = False


def _tokens(ids_N: torch.Tensor, lengths: torch.Tensor, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and lengths of sequences, int32. Raises ValueError where they do not belong together."""
    checked(ids_N, (None,))
    checked(lengths, (None,))
    if (len(lengths) and int(lengths.min()) < 1) or int(lengths.sum()) != len(ids_N):
        raise ValueError("the lengths are not those of the tokens")
    if len(ids_N) and not 0 <= int(ids_N.min()) <= int(ids_N.max()) < vocabulary:
        raise ValueError("tokens that the vocabulary does not have")
    return ids_N.int(), lengths.int()


def read_token_texts(fitting: Fitting, tokenizer: Any) -> list[TokenText]:
    """The tokens of every expert's text in the order of the experts, kept where text and settings are still the same.

    Raises TextError.
    """
    experts = fitting.recipe.experts
    texts, choosing = [], Choosing(fitting, tokenizer)
    fitting.run.begin("read tokens", len(experts))
    for place, expert in enumerate(experts):
        texts.append(_read(fitting, tokenizer, place, expert, choosing))
        fitting.run.progress("read tokens", place + 1, len(experts))
    return texts


class Choosing:
    """Where a fit chooses between variants: the tokens of the documents that it may choose by."""

    def __init__(self, fitting: Fitting, tokenizer: Any) -> None:
        checkpoint = fitting.checkpoint
        models = [checkpoint.folder / source.folder for source in checkpoint.record.sources]
        self.needed = fitting.settings.row.chooses
        self._texts = RecipeTexts(fitting.recipe, fitting.root, models=models, mixture=checkpoint.folder)
        self._tokenizer, self._length = tokenizer, fitting.settings.sequence_length

    def serves(self, kept: TokenText, place: int) -> bool:
        """Whether a domain's kept tokens have those documents, too, if they are needed."""
        return not self.needed or (kept.chooses and kept.source.get("held_out") == self._said(place)[1])

    def of(self, place: int) -> tuple[list[TokenSequence], dict[str, Any]]:
        """Sequences of a domain's documents, none where it has none, and what the kept tokens say of their source."""
        documents, said = self._said(place)
        return encode(self._tokenizer, documents, max_tokens=MOST_TOKENS // 8, sequence_length=self._length), said

    def _said(self, place: int) -> tuple[list[Document], dict[str, Any]]:
        own = self._texts.own(place)
        documents: list[Document] = [] if own is None else self._texts.select_of(own)
        return documents, text_record(documents, 0)


def _read(fitting: Fitting, tokenizer: Any, place: int, expert: Expert, choosing: Choosing) -> TokenText:
    path, settings = fitting.folder / f"{expert.name}.safetensors", fitting.settings
    kept, how = load_token_text(path, int(fitting.checkpoint.config["vocab_size"])), _how(tokenizer, expert, settings)
    if kept is not None and choosing.needed and not kept.chooses:
        kept = None
    known = kept is not None and kept.source.get("how") == how and isinstance(kept.source.get("text"), dict)
    if kept is not None and known and expert.name in fitting.stays:
        return kept
    try:
        documents = fit_documents(expert, fitting.root, place, reads=fitting.reads)
    except TextError as error:
        if kept is None or not known:
            raise without_text(error, kept and kept.source.get("how"), how) from None
        return kept  # the text is gone, and its tokens are what they would be
    record = text_record(documents, 0)
    said = {"sha256": record["sha256"], "how": how}
    if kept is not None and {key: kept.source.get(key) for key in said} == said and choosing.serves(kept, place):
        return kept
    sequences = read_examples(tokenizer, documents, expert, settings, most=MOST_TOKENS)
    if not sequences:
        raise none_fits(documents, settings.sequence_length, where=f"experts[{place}] '{expert.name}'")
    lengths = torch.tensor([len(sequence.ids) for sequence in sequences], dtype=torch.int32)
    ids_N = torch.tensor([each for sequence in sequences for each in sequence.ids], dtype=torch.int32)
    starts = torch.tensor([sequence.start for sequence in sequences], dtype=torch.int32)
    source = {"text": {**record, "tokens": len(ids_N)}, **said}
    if not choosing.needed:
        made = TokenText(ids_N, lengths, starts, source)
    else:
        held, of_held = choosing.of(place)
        held_N = torch.tensor([each for sequence in held for each in sequence.ids], dtype=torch.int32)
        held_lengths = torch.tensor([len(sequence.ids) for sequence in held], dtype=torch.int32)
        made = TokenText(ids_N, lengths, starts, {**source, "held_out": of_held}, held_N, held_lengths)
    made.save(path)
    return made


def _how(tokenizer: Any, expert: Expert, settings: Router) -> dict[str, Any]:
    return {**settings.model_dump(mode="json", include={"sequence_length"}), **chats_of(tokenizer, expert, settings)}
