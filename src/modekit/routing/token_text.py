"""The tokens of a domain's text, kept: what a table of evidence is trained on.

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
from modekit.text.held_out import fit_documents
from modekit.text.splits import text_record


@dataclass(frozen=True)
class TokenText:
    """Of one domain.

    Attributes:
        ids_N: token ids of its sequences, one after the other, int32.
        lengths: tokens of each, int32.
        starts: tokens of each before the first that says something, int32.
        source: what they were made from: settings and a digest of the text.
    """

    ids_N: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor
    source: dict[str, Any]

    def sequences(self) -> list[Tokens]:
        """Every sequence, and where it starts to say something."""
        return list(zip(torch.split(self.ids_N, self.lengths.tolist()), self.starts.tolist(), strict=True))

    def save(self, path: Path) -> None:
        """Write atomically."""
        starts = {"starts": self.starts} if "chat" in self.source["how"] else {}
        save_kept(path, {"ids": self.ids_N, "lengths": self.lengths, **starts}, {"token_text": True, "source": self.source})


def load_token_text(path: Path, vocabulary: int) -> TokenText | None:
    """Read a domain's tokens; None when there are none, or only what another fit keeps. Raises CheckpointError when damaged."""

    def make(get: Get, about: dict[str, Any]) -> TokenText | None:
        if not about.get("token_text"):
            return None
        ids_N, lengths = checked(get("ids"), (None,)), checked(get("lengths"), (None,))
        if not len(lengths) or int(lengths.min()) < 1 or int(lengths.sum()) != len(ids_N):
            raise ValueError("the lengths are not those of the tokens")
        if not 0 <= int(ids_N.min()) <= int(ids_N.max()) < vocabulary:
            raise ValueError("tokens that the vocabulary does not have")
        said = as_kind(about, _About)
        starts = checked(get("starts"), (len(lengths),)) if "chat" in said.source.get("how", {}) else torch.zeros_like(lengths)
        if int(starts.min()) < 0 or not bool((starts < lengths).all()):
            raise ValueError("texts that start behind their end")
        return TokenText(ids_N.int(), lengths.int(), starts.int(), said.source)

    return load_kept(path, make)


class _About(BaseModel):
    source: dict[str, Any]


def read_token_texts(fitting: Fitting, tokenizer: Any) -> list[TokenText]:
    """The tokens of every expert's text in the order of the experts, kept where text and settings are still the same.

    Raises TextError.
    """
    experts, vocabulary = fitting.recipe.experts, int(fitting.checkpoint.config["vocab_size"])
    texts = []
    for place, expert in enumerate(experts):
        texts.append(_read(fitting, tokenizer, place, expert, vocabulary))
        fitting.run.progress("read tokens", place + 1, len(experts))
    return texts


def _read(fitting: Fitting, tokenizer: Any, place: int, expert: Expert, vocabulary: int) -> TokenText:
    path, settings = fitting.folder / f"{expert.name}.safetensors", fitting.settings
    kept, how = load_token_text(path, vocabulary), _how(tokenizer, expert, settings)
    known = kept is not None and kept.source.get("how") == how and isinstance(kept.source.get("text"), dict)
    if kept is not None and known and expert.name in fitting.stays:
        return kept
    try:
        documents = fit_documents(expert, fitting.root, place)
    except TextError as error:
        if kept is None or not known:
            raise without_text(error, kept and kept.source.get("how"), how) from None
        return kept  # the text is gone, and its tokens are what they would be
    record = text_record(documents, 0)
    said = {"sha256": record["sha256"], "how": how}
    if kept is not None and {key: kept.source.get(key) for key in said} == said:
        return kept
    sequences = read_examples(tokenizer, documents, expert, settings, most=MOST_TOKENS)
    if not sequences:
        raise TextError(
            "the text is shorter than two tokens", where=f"experts[{place}] '{expert.name}'", remedy="give more text"
        )
    lengths = torch.tensor([len(sequence.ids) for sequence in sequences], dtype=torch.int32)
    ids_N = torch.tensor([each for sequence in sequences for each in sequence.ids], dtype=torch.int32)
    starts = torch.tensor([sequence.start for sequence in sequences], dtype=torch.int32)
    made = TokenText(ids_N, lengths, starts, {"text": {**record, "tokens": len(ids_N)}, **said})
    made.save(path)
    return made


def _how(tokenizer: Any, expert: Expert, settings: Router) -> dict[str, Any]:
    return {**settings.model_dump(mode="json", include={"sequence_length"}), **chats_of(tokenizer, expert, settings)}
