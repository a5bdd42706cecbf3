"""A conversation with a mixture: `modekit chat OUT`. What it answers, which experts led to each token, and which words decided.

Shape legend: S tokens of a prompt, E experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from modekit.checkpoint.checkpoint import Checkpoint, refuse_pairs
from modekit.engines.llama import Llama
from modekit.engines.modelfile import ends_of
from modekit.engines.sampling import Sampling, context_of
from modekit.engines.threads import default_threads
from modekit.engines.voices import AnswerToken, LlamaVoice, OnToken, TransformersVoice, Voice
from modekit.errors import TextError, check_packages
from modekit.evaluation.inspection.tokens import token_texts
from modekit.loaded.load import load_tokenizer
from modekit.routing.text_router import last_token_of, reads_tokens
from modekit.run import QUIET, Run
from modekit.text.chat import chat_template_of
from modekit.text.document import Message, message_of

_LONGEST = 8_192  # tokens of a context, where nobody asks for more: memory grows with it
_WORDS = 8  # that are named per expert


@dataclass(frozen=True)
class ChatSettings:
    """How a mixture is talked to: the options of `modekit chat`. None leaves it to the model, or the machine."""

    gguf: Path | None = None
    system: str | None = None
    temperature: float | None = None
    seed: int | None = None
    answer_tokens: int = 512
    context: int | None = None
    threads: int | None = None


@dataclass(frozen=True)
class ChatAnswer:
    """What was answered. `left_out`: messages at the beginning of the conversation that no longer fitted."""

    tokens: Sequence[AnswerToken]
    prompt: Sequence[int]
    left_out: int
    ended: Literal["end", "length", "context", "stopped"]

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(token.text for token in self.tokens)

    def led_by(self) -> Mapping[int, float]:
        """Place of each expert that led to some token -> the share of the tokens, the largest first; empty where unknown."""
        leaders = Counter(token.leader for token in self.tokens if token.leader is not None)
        return {expert: count / leaders.total() for expert, count in leaders.most_common()}


@dataclass(frozen=True)
class DecidingWords:
    """Why an answer began as it did: weights of experts at its first token; per expert, words that spoke for it, in nats."""

    weights: Mapping[str, float]
    words: Mapping[str, Sequence[tuple[str, float]]]


@dataclass
class Chat:
    """A conversation so far. `answer` is the last one."""

    checkpoint: Checkpoint
    tokenizer: PreTrainedTokenizerBase
    voice: Voice
    settings: ChatSettings
    context: int
    answer: ChatAnswer | None = None
    _said: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._template = chat_template_of(self.tokenizer)
        self._router = last_token_of(self.checkpoint) if reads_tokens(self.checkpoint) else None

    @property
    def has_template(self) -> bool:
        """Whether questions are answered; else texts are continued."""
        return self._template is not None

    def reset(self) -> None:
        """Forget what was said."""
        self._said, self.answer = [], None

    def ask(self, said: str, on_token: OnToken) -> ChatAnswer:
        """Answer; each token goes to `on_token` as it comes. KeyboardInterrupt ends the answer, which counts as far as it came.
        Raises TextError where the question leaves no room for an answer, or the template does not take it.
        """
        self._said.append(message_of("user", said.encode("utf-8", "replace").decode()))
        try:
            ids, left_out = self._prompt()
        except TextError:
            self._said.pop()
            raise
        room = min(self.settings.answer_tokens, self.context - len(ids))
        tokens: list[AnswerToken] = []

        def keep(token: AnswerToken) -> None:
            tokens.append(token)
            on_token(token)

        ended: Literal["end", "length", "context", "stopped"] = "stopped"
        try:
            at_end = self.voice.speak(ids, room, keep)
            ended = "end" if at_end else "length" if room == self.settings.answer_tokens else "context"
        except KeyboardInterrupt:
            pass
        self.answer = ChatAnswer(tokens, ids, left_out, ended)
        self._said.append(message_of("assistant", self.answer.text.strip()))
        return self.answer

    def _prompt(self) -> tuple[list[int], int]:
        """Tokens of the conversation, and how many of its first messages were left out. Raises TextError."""
        above = [] if self.settings.system is None else [message_of("system", self.settings.system)]
        wanted = self.context - min(self.settings.answer_tokens, self.context // 4)
        first = 0 if self._template is not None else len(self._said) - 1
        for start in range(first, len(self._said), 2):
            ids = self._ids([*above, *self._said[start:]])
            if len(ids) <= wanted:
                return ids, start - first
        if not 0 < len(ids) < self.context:
            raise TextError(
                "the question leaves no room for an answer" if ids else "the question has no token",
                found=f"{len(ids):,} tokens, of which some may be the chat template's",
                expected=f"fewer than {self.context:,}",
                remedy="ask for less at a time, or give a longer --context",
            )
        return ids, len(self._said) - 1 - first

    def _ids(self, messages: Sequence[Message]) -> list[int]:
        if self._template is not None:
            return self._template.ids(self._template.text(messages, answer=True))
        ids: list[int] = self.tokenizer(messages[-1]["content"], verbose=False)["input_ids"]
        return ids

    def why(self) -> DecidingWords | None:
        """The words that decided with whom the last answer began; None where the router reads more than words, or has none."""
        answer = self.answer
        if self._router is None or answer is None or not answer.tokens or answer.tokens[0].weights is None:
            return None
        added_SE, names = self._router.by_token(answer.prompt), self.checkpoint.names
        others_SE = (added_SE.sum(1, keepdims=True) - added_SE) / max(1, len(names) - 1)
        lead_SE = added_SE - others_SE
        words = words_at(token_texts(self.tokenizer, answer.prompt))
        weights = dict(zip(names, answer.tokens[0].weights, strict=True))
        strongest: dict[str, list[tuple[str, float]]] = {}
        for expert, name in enumerate(names):
            sums = [(word, float(lead_SE[places, expert].sum())) for word, places in words.items()]
            strongest[name] = sorted((each for each in sums if each[1] > 0), key=lambda each: -each[1])[:_WORDS]
        return DecidingWords(weights, strongest)


def words_at(texts: Sequence[str]) -> Mapping[str, list[int]]:
    """Word -> places of the tokens that it is made of, wherever it stands. Words have letters and digits alone."""
    found: dict[str, list[int]] = {}
    word, places = "", list[int]()
    for place, text in enumerate([*texts, " "]):
        if not (text[:1].isalnum() and word[-1:].isalnum()):
            if word.strip():
                found.setdefault(word.strip(), []).extend(places)
            word, places = "", []
        word += text
        places.append(place)
    return found


@contextmanager
def chatting(checkpoint: Checkpoint, settings: ChatSettings, *, run: Run = QUIET) -> Iterator[Chat]:
    """A mixture that is ready to be asked inside the block. Raises UnsupportedError for a mixture with an encoder; EngineError
    where llama.cpp does not load the file, is not there, or for a context that the model was not trained for; SourceError.
    """
    refuse_pairs(checkpoint, "chats are with models that write a text on", option="")
    possible = context_of(checkpoint, settings.context)
    tokenizer = load_tokenizer(checkpoint.folder, run=run)
    context, template = settings.context or min(possible, _LONGEST), chat_template_of(tokenizer)
    sampling = Sampling.of(checkpoint.folder)
    ends = ends_of(tokenizer, sampling, None if template is None else template.turn())
    sampling = replace(sampling, ends=ends, seed=settings.seed).at(settings.temperature)
    with ExitStack() as stack:
        if settings.gguf is None:
            voice: Voice = TransformersVoice(checkpoint, tokenizer, sampling, run=run)
        else:
            check_packages(("xllamacpp",), "pip install 'modekit[gguf]', or leave --gguf out")
            threads = settings.threads or default_threads()
            llama = stack.enter_context(Llama(settings.gguf.absolute(), context=context, threads=threads, exact=False))
            voice = LlamaVoice(checkpoint, tokenizer, sampling, llama)
        yield Chat(checkpoint, tokenizer, voice, settings, context)
