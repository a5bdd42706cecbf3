"""What speaks in a chat: a mixture in transformers, or its GGUF in llama.cpp. Both say who led to each token.

Shape legend: B batch (1), S sequence, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TypeAlias

import torch
from transformers import PreTrainedTokenizerBase

from modekit.architecture.modekit_router import select
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.engines.llama import Llama
from modekit.engines.sampling import Sampling
from modekit.errors import UnsupportedError
from modekit.evaluation.inspection.passes import router_weights
from modekit.evaluation.inspection.tokens import RunningText
from modekit.loaded.load import load_model
from modekit.loaded.mixture import RouterTrace
from modekit.loaded.shapes import mixture_of
from modekit.routing.text_router import last_token_of, reads_tokens
from modekit.run import QUIET, Run


@dataclass(frozen=True)
class AnswerToken:
    """What a token of an answer says, and by which experts it was chosen: the mean of their weights over the routers, in recipe
    order, where the token before it was read; None where that cannot be known.
    """

    text: str
    weights: tuple[float, ...] | None

    @property
    def leader(self) -> int | None:
        """Place of the expert with the largest weight."""
        return None if self.weights is None else max(range(len(self.weights)), key=self.weights.__getitem__)


OnToken = Callable[[AnswerToken], None]


class TransformersVoice:
    """A mixture as transformers loads it. A token's experts are what its routers decided in the pass that chose it."""

    engine = "transformers"

    def __init__(
        self, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, *, run: Run = QUIET
    ) -> None:
        self._checkpoint, self._tokenizer, self._sampling = checkpoint, tokenizer, sampling
        self._model = load_model(checkpoint.folder, dtype="auto", run=run)
        self._mixture = mixture_of(self._model, checkpoint)
        self._expert: int | None = None
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)

    def use_expert(self, expert: int | None) -> None:
        """Always take this expert; None: as the routers choose."""
        self._expert = expert

    def speak(self, ids: Sequence[int], most: int, on_token: OnToken) -> bool:
        """Write at most so many tokens after the given ones, in this thread; whether the answer came to its own end."""
        forced = nullcontext() if self._expert is None else self._mixture.forced(self._expert)
        text, read, at_end = RunningText(self._tokenizer), 0, False

        def put(tokens: torch.Tensor) -> None:  # the prompt (B, S), then one token (B,) after another
            nonlocal read, at_end
            if not read:
                read = len(ids)
                return
            token = int(tokens.flatten()[-1])
            at_end = token in self._sampling.ends
            if not at_end:
                weights, read = self._weights(trace, read), 1
                on_token(AnswerToken(text.add(token), weights))

        with torch.inference_mode(), self._mixture.traced() as trace, forced:
            given = torch.tensor([ids], device=self._model.device)
            self._model.generate(
                input_ids=given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=most,
                pad_token_id=0,
                streamer=SimpleNamespace(put=put, end=lambda: None),
                **self._sampling.for_transformers(),
            )
        return at_end

    def _weights(self, trace: RouterTrace, read: int) -> tuple[float, ...] | None:
        """Of the experts at the last token of a pass that has read so many. With a forced expert it is all of it."""
        names, positions = self._checkpoint.names, self._checkpoint.shape.positions
        if self._expert is not None:
            return tuple(float(place == self._expert) for place in range(len(names)))
        found = list(router_weights(self._checkpoint, trace, [torch.Size((1, read))] * len(positions)))
        if not found:
            return None
        last = torch.stack([each[0, -1].float().reshape(-1, len(names)).mean(0).cpu() for each in found])
        return tuple(last.mean(0).tolist())


class LlamaVoice:
    """A GGUF of the mixture in llama.cpp. Of routers that read tokens alone it is known what they decide; of others not."""

    engine = "llama.cpp"

    def __init__(self, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, llama: Llama) -> None:
        self._tokenizer, self._sampling, self._routing = tokenizer, sampling, checkpoint.shape.routing.as_written()
        self._router = last_token_of(checkpoint) if reads_tokens(checkpoint) else None
        self._llama = llama

    def use_expert(self, expert: int | None) -> None:
        """Raises UnsupportedError for an expert: a file has its routers built in."""
        if expert is not None:
            raise UnsupportedError(
                "llama.cpp takes the experts that the routers choose", where="/expert", remedy="chat without --gguf"
            )

    def speak(self, ids: Sequence[int], most: int, on_token: OnToken) -> bool:
        """The same as the server streams it. Raises EngineError."""
        read = list(ids)
        for text, tokens, is_cut in self._llama.written(ids, most, self._sampling):
            if self._sampling.ends.intersection(tokens) or is_cut:
                return not is_cut
            if text:
                on_token(AnswerToken(text, self._weights(read)))
                read += self._ids(text, tokens)
        return True

    def _ids(self, text: str, tokens: list[int]) -> list[int]:
        """Tokens of what came; of a character made of several the server names the last one."""
        if str(self._tokenizer.decode(tokens)).strip() == text.strip():
            return tokens
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _weights(self, ids: Sequence[int]) -> tuple[float, ...] | None:
        if self._router is None:
            return None
        logits_E = torch.from_numpy(self._router.logits(ids)).float()
        return tuple(select(logits_E, self._routing).tolist())


Voice: TypeAlias = TransformersVoice | LlamaVoice
"""A mixture that writes on."""
