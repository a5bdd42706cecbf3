"""lm-evaluation-harness's model over one that is already loaded. Imports lm_eval: only import it where the extra is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modekit.evaluation.tasks.prefixes import Continuation, answers_of

Request = tuple[tuple[str, str], list[int], list[int]]
_GENERATED = 16  # texts that are generated side by side


class LoadedModel(HFLM):  # type: ignore[misc]
    """HFLM that masks pads: its own scoring gives none, and routers that read the text so far must not read pads.

    `advance` is called with the number of requests just answered.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, advance: Callable[[int], object] = lambda _: None
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=_GENERATED)
        self._advance = advance

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """As HFLM, without its bar."""
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """As HFLM, without its bar."""
        answers: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """As HFLM, without its bar."""
        answers: list[str] = []
        for start in range(0, len(requests), 4 * _GENERATED):
            part = requests[start : start + 4 * _GENERATED]
            with torch.inference_mode():
                answers += super().generate_until(part, disable_tqdm=True)
            self._advance(len(part))
        return answers

    def _loglikelihood_tokens(self, requests: list[Request], **_: Any) -> list[tuple[float, bool]]:
        """Sum of log p of each continuation's tokens, and whether each is the likeliest; too long ones lose their beginning."""
        pairs = [(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        if any(not continuation for _, continuation in pairs):
            raise ValueError("a continuation without tokens")
        longest = self.max_length + 1  # the last token is predicted, not read
        asked = {}
        for context, continuation in dict.fromkeys(pairs):  # tasks ask the same again: a continuation by itself
            ids = (context + continuation)[-longest:]
            asked[context, continuation] = Continuation(ids, max(len(ids) - len(continuation), 1))
        every = list(dict.fromkeys(asked.values()))
        answers: dict[Continuation, tuple[float, bool]] = {}
        total, read, reported = sum(len(each.ids) for each in every), 0, 0
        with torch.inference_mode():
            for answered, tokens in answers_of(self.model, every):
                answers.update(answered)
                read += tokens  # requests count by their tokens: the longest come first
                done = len(requests) * read // total
                self._advance(done - reported)
                reported = done
        self._advance(len(requests) - reported)
        return [answers[asked[pair]] for pair in pairs]
