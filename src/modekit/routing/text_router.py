"""Whose text is this? What a mixture's router says of a text, without any model: one answer for all of it.

Lexical routers need nothing else to decide. A proxy before engines that serve the experts asks one which of them takes a
request (engines/litellm_hook.py). Inside a mixture a router answers at every token (architecture/modekit_router.py). Here only
the last answer is wanted, which is one weighted sum over rows of a table.

Shape legend: S tokens of the text, E experts, V rows of a table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from modekit.architecture.modekit_router import ngram_rows
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.evidence import read_table
from modekit.errors import CheckpointError, UnsupportedError
from modekit.loaded.load import load_tokenizer
from modekit.recipes.strict import BASE
from modekit.run import QUIET, Run
from modekit.text.chat import chat_template_of
from modekit.text.document import Message
from modekit.text.plain import whole

_UNSURE = 0.5
"""No expert's probability is above this: nobody knows whose text it is."""
_CHARACTERS, _TURNS, _MESSAGES = 16_384, 8, 64
_KEPT = 0.5
"""An expert that had a conversation keeps it while its probability is this share of the likeliest one's."""


@dataclass(frozen=True)
class Decision:
    """Whose text it is.

    Attributes:
        expert: by name; `base` for the base model, also where nobody is likely enough.
        probabilities: of every expert, by name; they sum to one.
        tokens: how many were read.
    """

    expert: str
    probabilities: Mapping[str, float]
    tokens: int


class TextRouter:
    """A mixture's router on its own."""

    def __init__(self, checkpoint: Checkpoint, *, run: Run = QUIET) -> None:
        """Read it. Raises UnsupportedError when it reads anything but tokens; SourceError without a tokenizer; CheckpointError
        for a table that is not finite.
        """
        settings, status = checkpoint.record.router.settings, checkpoint.record.router.status
        if settings is None or settings.row.reads != "tokens" or status == "unfitted":
            raise UnsupportedError(
                "the mixture's router cannot tell by a text alone whose it is",
                where=str(checkpoint.folder),
                found="fixed weights" if settings is None else f"fit: {settings.fit}",
                remedy="`modekit fit OUT fit=lexical`; gates of a plain checkpoint have no room "
                "for a table: build again with mixture: {router: {fit: lexical}}",
            )
        self._folder, self._names = checkpoint.folder, checkpoint.names
        self._unknown = next((expert.name for expert in checkpoint.record.recipe.experts if expert.is_base), BASE)
        self._tokenizer = load_tokenizer(checkpoint.folder, run=run)
        self._template = chat_template_of(self._tokenizer) if settings.chat is not False else None
        self._router = last_token_of(checkpoint)

    def decide(self, said: str | Sequence[Message]) -> Decision:
        """Whose a text is, or a conversation: then what the system said weighs nothing, and an expert keeps it over its turns.

        It goes to another only where that one is clearly likelier. The newest 16,384 characters decide, of a conversation its
        last turns, so that no text takes long. Raises TextError when the chat template does not take it; CheckpointError where
        the answer would be no number.
        """
        if isinstance(said, str):
            return self._decide(self._tokenizer(whole(said[-_CHARACTERS:]), verbose=False)["input_ids"], None)
        turns = _newest([message for message in said if message["role"] != "system"])
        asked = [end for end, message in enumerate(turns, 1) if message["role"] == "user"]
        found = self._decide([], None)
        for end in asked[-_TURNS:]:
            found = self._decide(self._ids(turns[:end]), found.expert if found.tokens else None)
        return found

    def _ids(self, turns: Sequence[Message]) -> list[int]:
        if self._template is not None:
            return self._template.ids(self._template.text(turns, answer=True))
        ids: list[int] = self._tokenizer("\n\n".join(each["content"] for each in turns), verbose=False)["input_ids"]
        return ids

    def _decide(self, ids: list[int], before: str | None) -> Decision:
        if not ids:
            return Decision(self._unknown, dict.fromkeys(self._names, 1 / len(self._names)), 0)
        with np.errstate(all="ignore"):
            logits_E = self._router.by_token(ids).sum(0).astype(np.float64)
            powers_E = np.exp(logits_E - logits_E.max())
            probabilities: dict[str, float] = dict(zip(self._names, (powers_E / powers_E.sum()).tolist(), strict=True))
        if not all(map(math.isfinite, probabilities.values())):
            raise CheckpointError(
                "the router's answer is no number", where=str(self._folder), remedy="set the router again with `modekit fit`"
            )
        best = max(probabilities, key=probabilities.__getitem__)
        if before in probabilities and probabilities[before] >= _KEPT * probabilities[best]:
            best = before
        elif probabilities[best] <= _UNSURE:
            best = self._unknown
        return Decision(best, probabilities, len(ids))


def _newest(turns: Sequence[Message]) -> list[Message]:
    """The last turns that decide; of a long one its end."""
    kept: list[Message] = []
    left = _CHARACTERS
    for message in reversed(turns[-_MESSAGES:]):
        if left <= 0:
            break
        kept.append({**message, "content": whole(message["content"][-left:])})
        left -= len(message["content"])
    return kept[::-1]


class LastToken:
    """A router that reads tokens, on its own: what it says after the last token of a text."""

    def __init__(self, tables_VE: Sequence[np.ndarray], decays: Sequence[float], orders: Sequence[int | None] = ()) -> None:
        """A table for every average, with its decay, and if it is of n-grams, their order."""
        self._tables_VE = [np.ascontiguousarray(each, dtype=np.float32) for each in tables_VE]
        self._decays, self._orders = decays, orders or (None,) * len(decays)

    def by_token(self, ids: Sequence[int]) -> np.ndarray:
        """What each of some tokens adds to the logits after the last one, (S, E), float32; their sum is the logits."""
        ids_1S, found = torch.tensor([ids]), []
        for rows_VE, order, decay in zip(self._tables_VE, self._orders, self._decays, strict=True):
            if order is not None:
                ids_1S = ngram_rows(torch.tensor([ids]), torch.ones_like(ids_1S), None, order, len(rows_VE))[0]
            weights_S = np.power(decay, np.arange(len(ids) - 1, -1, -1), dtype=np.float32)  # 0**0 is 1
            found.append((weights_S / weights_S.sum())[:, None] * rows_VE[ids_1S[0].numpy()])
        added_SE: np.ndarray = np.stack(found).sum(axis=0, dtype=np.float32)
        return added_SE


def last_token_of(checkpoint: Checkpoint) -> LastToken:
    """A mixture's router that reads tokens, without any model; also where channels of the embedding carry its table."""
    if checkpoint.shape.channels is not None:
        channels, embedding = checkpoint.carrier
        return LastToken(np.split(read_table(channels, embedding), len(channels.decays), axis=1), channels.decays)
    routing = checkpoint.shape.routing.model_dump(mode="json")
    decays = [average["decay"] for average in routing["averages"]]
    return LastToken(np.split(checkpoint.gates()[0].T, len(decays)), decays, routing.get("orders") or ())
