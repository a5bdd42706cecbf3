"""lm-evaluation-harness's model over one that is already loaded. Imports lm_eval: only import it where the extra is there.

Shape legend: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modekit.evaluation.loss import tokens_per_pass
from modekit.text.sequences import TokenSequence, make_batches

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

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """As HFLM, without its bar."""
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """As HFLM, without its bar."""
        answers: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
        return answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
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
        asked = list(dict.fromkeys(pairs))  # tasks ask the same again: a continuation by itself, another form's pair
        longest = self.max_length + 1  # the last token is predicted, not read
        sequences = [TokenSequence((context + continuation)[-longest:], 0) for context, continuation in asked]
        answers: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[float, bool]] = {}
        with torch.inference_mode():
            for batch in make_batches(sequences, tokens=tokens_per_pass(self.model.config)):
                ids_BS, mask_BS = batch.input_ids.to(self.device), batch.mask.to(self.device)
                logits_BSV = self.model(input_ids=ids_BS[:, :-1], attention_mask=mask_BS[:, :-1].long(), use_cache=False).logits
                for place, row in enumerate(batch.rows):
                    length = len(sequences[row].ids)
                    start = max(length - len(asked[row][1]), 1)
                    target = ids_BS[place, start:length]
                    log_p = logits_BSV[place, start - 1 : length - 1].float().log_softmax(-1)
                    likeliest = bool((log_p.argmax(-1) == target).all())
                    answers[asked[row]] = (float(log_p.gather(1, target[:, None]).double().sum()), likeliest)
                self._advance(len(batch.rows))
        self._advance(len(requests) - len(asked))
        return [answers[pair] for pair in pairs]
