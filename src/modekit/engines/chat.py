"""A conversation with a mixture: `modekit chat OUT`. What it answers, and which experts led to each token.

Shape legend: B batch (1), S sequence, E experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import refuse_pairs
from modekit.engines.registry import ChatSettings
from modekit.engines.serve import context_of
from modekit.errors import TextError
from modekit.evaluation.inspection.passes import router_weights
from modekit.evaluation.inspection.tokens import RunningText
from modekit.loaded.load import load_model, load_tokenizer
from modekit.loaded.mixture import RouterTrace
from modekit.loaded.shapes import mixture_of
from modekit.run import QUIET, Run
from modekit.text.chat import chat_template_of
from modekit.text.document import Message, message_of
from modekit.text.plain import token_ids, whole

_GREEDY = {"do_sample": False, **dict.fromkeys(("temperature", "top_p", "top_k", "min_p"))}


@dataclass(frozen=True)
class AnswerToken:
    """What a token of an answer says, and by which experts it was chosen: the mean of their weights over the routers, in recipe
    order, in the pass that chose it; None where there are no routers.
    """

    text: str
    weights: tuple[float, ...] | None

    @property
    def leader(self) -> int | None:
        """Place of the expert with the largest weight."""
        return None if self.weights is None else max(range(len(self.weights)), key=self.weights.__getitem__)


OnToken = Callable[[AnswerToken], None]


@dataclass(frozen=True)
class ChatAnswer:
    """What was answered, up to its own end or not. `left_out`: messages at the beginning of the talk that no longer fitted."""

    tokens: Sequence[AnswerToken]
    prompt: Sequence[int]
    left_out: int
    ended: bool

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(token.text for token in self.tokens)

    def led_by(self) -> Mapping[int, float]:
        """Place of each expert that led to some token -> the share of the tokens, the largest first; empty where unknown."""
        leaders = Counter(token.leader for token in self.tokens if token.leader is not None)
        return {expert: count / leaders.total() for expert, count in leaders.most_common()}


class Chat:
    """A conversation so far.

    Raises UnsupportedError for a mixture with an encoder; EngineError for a context that the model was not trained for;
    SourceError.
    """

    def __init__(self, checkpoint: Checkpoint, settings: ChatSettings, *, run: Run = QUIET) -> None:
        refuse_pairs(checkpoint, "chats are with models that write a text on")
        self.checkpoint, self._settings = checkpoint, settings
        self.context = context_of(checkpoint, settings.context)
        self._tokenizer = load_tokenizer(checkpoint.folder, run=run)
        self._template = chat_template_of(self._tokenizer)
        self._model: Any = load_model(checkpoint.folder, dtype="auto", run=run)
        self._mixture = mixture_of(self._model, checkpoint)
        self._ends = _ends_of(self._model, self._tokenizer, None if self._template is None else self._template.turn())
        torch.seed() if settings.seed is None else torch.manual_seed(settings.seed)
        self._said: list[Message] = []

    def ask(self, said: str, on_token: OnToken) -> ChatAnswer:
        """Answer; each token goes to `on_token` as it comes. KeyboardInterrupt ends the answer, which counts as far as it came.
        Raises TextError where the question leaves no room for an answer, or the template does not take it; after an error the
        question was not asked.
        """
        messages = [*self._said, message_of("user", whole(said))]
        ids, left_out = self._prompt(messages)
        room = min(self._settings.max_tokens, self.context - len(ids))
        tokens: list[AnswerToken] = []

        def keep(token: AnswerToken) -> None:
            tokens.append(token)
            on_token(token)

        ended = False
        with suppress(KeyboardInterrupt):
            ended = self._write_on(ids, room, keep)
        answer = ChatAnswer(tokens, ids, left_out, ended)
        self._said = [*messages, message_of("assistant", answer.text.strip())]
        return answer

    def _prompt(self, messages: Sequence[Message]) -> tuple[list[int], int]:
        """Tokens of the conversation, and how many of its first messages were left out. Raises TextError."""
        above = [] if self._settings.system is None else [message_of("system", self._settings.system)]
        wanted = self.context - min(self._settings.max_tokens, self.context // 4)
        first = 0 if self._template is not None else len(messages) - 1
        for start in range(first, len(messages), 2):
            ids = self._ids([*above, *messages[start:]])
            if len(ids) <= wanted:
                return ids, start - first
        if not 0 < len(ids) < self.context:
            raise TextError(
                "the question leaves no room for an answer" if ids else "the question has no token",
                found=f"{len(ids):,} tokens, of which some may be the chat template's",
                expected=f"fewer than {self.context:,}",
                remedy="ask for less at a time, or give a longer --context",
            )
        return ids, len(messages) - 1 - first

    def _ids(self, messages: Sequence[Message]) -> list[int]:
        if self._template is not None:
            return self._template.ids(self._template.text(messages, answer=True))
        return token_ids(self._tokenizer, messages[-1]["content"])

    def _write_on(self, ids: Sequence[int], most: int, on_token: OnToken) -> bool:
        """Write at most so many tokens after the given ones; whether the answer came to its own end."""
        text, read, at_end = RunningText(self._tokenizer), 0, False
        temperature = self._settings.temperature
        drawn: dict[str, Any] = {"num_beams": 1, "num_return_sequences": 1}  # whatever generation_config.json says
        if temperature is not None:
            drawn |= {"do_sample": True, "temperature": temperature} if temperature > 1e-4 else _GREEDY  # of less, no softmax

        def put(tokens: torch.Tensor) -> None:  # the prompt (B, S), then one token (B,) after another
            nonlocal read, at_end
            if not read:
                read = len(ids)
                return
            token = int(tokens.flatten()[-1])
            at_end = token in self._ends
            if not at_end:
                weights, read = self._weights(trace, read), 1
                on_token(AnswerToken(text.add(token), weights))

        with torch.inference_mode(), self._mixture.traced() as trace:
            given = torch.tensor([ids], device=self._model.device)
            self._model.generate(
                input_ids=given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=most,
                pad_token_id=0,
                eos_token_id=sorted(self._ends) or None,
                streamer=SimpleNamespace(put=put, end=lambda: None),
                **drawn,
            )
        return at_end

    def _weights(self, trace: RouterTrace, read: int) -> tuple[float, ...] | None:
        """Of the experts at the last token of a pass that has read so many."""
        names, positions = self.checkpoint.names, self.checkpoint.shape.positions
        found = list(router_weights(self.checkpoint, trace, [torch.Size((1, read))] * len(positions)))
        if not found:
            return None
        last = torch.stack([each[0, -1].float().reshape(-1, len(names)).mean(0).cpu() for each in found])
        return tuple(last.mean(0).tolist())


def _ends_of(model: Any, tokenizer: PreTrainedTokenizerBase, turn: str | None) -> frozenset[int]:
    """Tokens with which an answer ends: the model's, the tokenizer's, and special ones that stand before the next turn."""
    own = model.generation_config.eos_token_id
    behind = [] if turn is None else tokenizer(turn, add_special_tokens=False, verbose=False)["input_ids"][:1]
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id, *special.intersection(behind)}
    return frozenset(ends - {None})
