"""Whose text is this? What a mixture's router says of a text, without any model: one answer for all of it.

Routers that read tokens (lexical) need nothing else to decide. A proxy before engines that serve the
experts asks one which of them takes a request (engines/litellm_hook.py), and so may anybody.

Inside a mixture a router answers at every token (architecture/modekit_router.py). Here only the last answer is wanted, which is
one weighted sum over rows of a table. numpy takes a tenth of the time that torch's operations need to be called.

Shape legend: S tokens of the text, E experts, V rows of a table, J averages, G columns of the gate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.evidence import read_table
from modekit.errors import CheckpointError, UnsupportedError
from modekit.loaded.load import load_tokenizer
from modekit.recipes.recipe import place_of_base
from modekit.recipes.strict import BASE
from modekit.run import QUIET, Run
from modekit.text.chat import chat_template_of
from modekit.text.document import Message

RoutingData = Mapping[str, Any]
"""The config's `modekit.routing` (planning/mixture_config.py) as plain data."""
_UNSURE = 0.5
"""No expert's probability is above this: nobody knows whose text it is."""
_CHARACTERS, _TURNS, _MESSAGES = 16_384, 8, 64
_KEPT = 0.5
"""An expert that had a conversation keeps it while its probability is this share of the likeliest one's."""

_PRIME = 2**31 - 1


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


def reads_tokens(checkpoint: Checkpoint) -> bool:
    """Whether the router decides on token ids alone, and is set."""
    settings = checkpoint.record.router.settings
    return settings is not None and settings.row.tells_texts and checkpoint.record.router.status != "unfitted"


class TextRouter:
    """A mixture's router on its own."""

    def __init__(self, checkpoint: Checkpoint, *, run: Run = QUIET) -> None:
        """Read it. Raises UnsupportedError when it reads anything but tokens; SourceError without a tokenizer; CheckpointError
        for a table that is not finite.
        """
        settings = checkpoint.record.router.settings
        if settings is None or not reads_tokens(checkpoint):
            raise UnsupportedError(
                "the mixture's router needs the model",
                where=str(checkpoint.folder),
                found="fixed weights" if settings is None else f"fit: {settings.fit}",
                remedy="`modekit fit OUT fit=lexical`; gates of a plain checkpoint have no room "
                "for a table: build again with mixture: {router: {fit: lexical}}",
            )
        self._folder, self._names = checkpoint.folder, checkpoint.names
        base = place_of_base(checkpoint.record.recipe.experts)
        self._unknown = BASE if base is None else self._names[base]
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
            return self._decide(self._tokenizer(_clean(said[-_CHARACTERS:]), verbose=False)["input_ids"], None)
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
        probabilities = dict(zip(self._names, self._probabilities(ids), strict=True))
        best = max(probabilities, key=probabilities.__getitem__)
        if before in probabilities and probabilities[before] >= _KEPT * probabilities[best]:
            best = before
        elif probabilities[best] <= _UNSURE:
            best = self._unknown
        return Decision(best, probabilities, len(ids))

    def _probabilities(self, ids: list[int]) -> list[float]:
        """One per expert. Raises CheckpointError where the router's numbers are too large to be added up."""
        with np.errstate(all="ignore"):
            logits_E = self._router.logits(ids).astype(np.float64)
            powers_E = np.exp(logits_E - logits_E.max())
            found: list[float] = (powers_E / powers_E.sum()).tolist()
        if not all(map(math.isfinite, found)):
            raise CheckpointError(
                "the router's answer is no number", where=str(self._folder), remedy="set the router again with `modekit fit`"
            )
        return found


def _clean(text: str) -> str:
    """Half of a surrogate pair is no character."""
    return text.encode("utf-8", "replace").decode()


def _newest(turns: Sequence[Message]) -> list[Message]:
    """The last turns that decide; of a long one its end."""
    kept: list[Message] = []
    left = _CHARACTERS
    for message in reversed(turns[-_MESSAGES:]):
        if left <= 0:
            break
        kept.append({**message, "content": _clean(message["content"][-left:])})
        left -= len(message["content"])
    return kept[::-1]


class LastToken:
    """A router that reads tokens, with its gate: what it says after the last token of a text."""

    def __init__(self, routing: RoutingData, gate_EG: np.ndarray) -> None:
        """`routing` is the config's `modekit.routing` (see `Router`)."""
        averages = routing["averages"]
        self._decays: list[float] = [average["decay"] for average in averages]
        self._orders: Sequence[int | None] = routing.get("orders") or [None] * len(averages)
        self._parts_VE = [
            np.ascontiguousarray(part_EV.T, dtype=np.float32) for part_EV in np.split(gate_EG, len(averages), axis=1)
        ]

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """After the last of some tokens (E,), float32."""
        said_E: np.ndarray = self.by_token(ids).sum(0)
        return said_E

    def by_token(self, ids: Sequence[int]) -> np.ndarray:
        """What each of some tokens adds to the logits after the last one, (S, E), float32."""
        ids_S = np.asarray(ids, dtype=np.int64)
        found = []
        for rows_VE, order, decay in zip(self._parts_VE, self._orders, self._decays, strict=True):
            rows_S = ids_S if order is None else rows_of_ngrams(ids_S, order, len(rows_VE))
            weights_S = np.power(decay, np.arange(len(rows_S) - 1, -1, -1), dtype=np.float32)  # 0**0 is 1
            found.append((weights_S / weights_S.sum())[:, None] * rows_VE[rows_S])
        added_SE: np.ndarray = np.stack(found).sum(axis=0, dtype=np.float32)
        return added_SE


def rows_of_ngrams(ids_S: np.ndarray, order: int, buckets: int) -> np.ndarray:
    """Row of a table for the n-gram that ends in each token (S,), int64: what `ngram_rows` says of a text without pads.

    That is one of the files which are copied into checkpoints as they are, and works on batches; this is the same in numpy.
    """
    tokens = np.concatenate([np.zeros(order - 1, dtype=np.int64), ids_S + 1])
    hashed_S = np.zeros_like(ids_S)
    for start in range(order - 1, -1, -1):  # the newest token first
        hashed_S = (hashed_S * 1_000_003 + tokens[start : start + len(ids_S)] * 7_919 + 13) % _PRIME
    rows_S: np.ndarray = hashed_S % buckets
    return rows_S


def last_token_of(checkpoint: Checkpoint) -> LastToken:
    """A mixture's router that reads tokens, without any model."""
    return LastToken(*_routing_and_gate(checkpoint))


def _routing_and_gate(checkpoint: Checkpoint) -> tuple[RoutingData, np.ndarray]:
    """How a router that reads tokens decides, and its gate (E, G); also where channels of the embedding carry it."""
    if checkpoint.shape.channels is None:
        return checkpoint.shape.routing.model_dump(mode="json"), checkpoint.gates()[0]
    channels, embedding = checkpoint.carrier
    tables = np.split(read_table(channels, embedding), len(channels.decays), axis=1)
    routing = {"method": "gating", "score": "lexical", "averages": [{"decay": decay} for decay in channels.decays]}
    return routing, np.concatenate([table_VE.T for table_VE in tables], axis=1)
