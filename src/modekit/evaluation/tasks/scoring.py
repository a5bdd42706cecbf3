"""lm-evaluation-harness's model over one that is already loaded. Imports lm_eval: only import it where the extra is there.

Texts with a long beginning in common go on from its keys and values: a question's answers from the question, questions from
their few-shot examples. The rest is batched by length.

Shape legend: B batch, S sequence, K tokens whose logits are kept, V vocabulary.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicLayer

from modekit.evaluation.loss import tokens_per_pass
from modekit.loaded.passes import cache_of, with_cache
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

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """As HFLM, in parts, so that `advance` hears of each."""
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


WORTH = {"cpu": 64}
"""Tokens that must be saved for passes of their own, by device: each costs about 20 beside those that it reads."""
_WORTH_ELSEWHERE = 512  # on an accelerator, which reads many tokens as fast as few

Answer = tuple[float, bool]
"""Log p, and whether every token is the likeliest."""


@dataclass(frozen=True)
class Continuation:
    """Token ids, of which those from `start` on are predicted."""

    ids: tuple[int, ...]
    start: int

    @property
    def read(self) -> tuple[int, ...]:
        """What the model reads."""
        return self.ids[:-1]


@dataclass(frozen=True)
class _Reading:
    """What one pass reads, and all that is answered by it."""

    read: tuple[int, ...]
    asked: tuple[Continuation, ...]

    @property
    def first(self) -> int:
        """The first place whose logits are needed."""
        return min(each.start for each in self.asked) - 1

    @property
    def tokens(self) -> int:
        """All that is asked for here."""
        return sum(len(each.ids) for each in self.asked)


def answers_of(model: PreTrainedModel, asked: Sequence[Continuation]) -> Iterator[tuple[dict[Continuation, Answer], int]]:
    """What is asked, part by part, and how many of its tokens each part answers."""
    shares = _shares(model)
    texts = _texts(asked, shares)
    worth = WORTH.get(model.device.type, _WORTH_ELSEWHERE)
    alone: list[_Reading] = []
    for group in _groups(texts, 0, worth) if shares else [texts]:
        if not shares or _saved(group, 0) <= worth:
            alone += group
        else:
            yield from _go_on(model, group, None, 0, worth)
    yield from _read(model, alone, None, 0)


def _shares(model: PreTrainedModel) -> bool:
    """Whether a text may go on from another's keys and values: not where layers keep anything else, or not every token's."""
    with torch.inference_mode():
        cache = cache_of(model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=True))
    return cache is not None and bool(cache.layers) and all(type(layer) is DynamicLayer for layer in cache.layers)


def _texts(asked: Sequence[Continuation], shares: bool) -> list[_Reading]:
    """The texts to read, in the order of their tokens; one that begins another is answered with it."""
    found: list[_Reading] = []
    ordered = sorted(asked, key=lambda each: each.read)
    for each, group in itertools.groupby(ordered, key=lambda each: each.read):
        here = tuple(group)
        if found and shares and each[: len(found[-1].read)] == found[-1].read:
            here = (*found.pop().asked, *here)
        found.append(_Reading(each, here))
    return found


def _common(texts: Sequence[_Reading]) -> int:
    """How many first tokens sorted texts have in common, of each at least the last one left to read."""
    both = zip(texts[0].read, texts[-1].read, strict=False)
    common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], both))
    return min(common, *(len(text.read) - 1 for text in texts), *(text.first for text in texts))


def _saved(texts: Sequence[_Reading], done: int) -> int:
    """Tokens that need not be read when what sorted texts have in common, beyond `done`, is read once."""
    return (len(texts) - 1) * (_common(texts) - done) if len(texts) > 1 else 0


def _groups(texts: Sequence[_Reading], done: int, worth: int) -> list[list[_Reading]]:
    """Sorted texts, split where they have hardly more than `done` tokens in common with the one before."""
    groups: list[list[_Reading]] = []
    for text in texts:
        if groups and _common([groups[-1][0], text]) - done > worth // 4:
            groups[-1].append(text)
        else:
            groups.append([text])
    return groups


def _go_on(
    model: PreTrainedModel, texts: list[_Reading], cache: Cache | None, done: int, worth: int
) -> Iterator[tuple[dict[Continuation, Answer], int]]:
    """Answer texts that share more than `done` tokens, which the cache holds."""
    common = _common(texts)
    if common > done:
        ids_BS = torch.tensor([texts[0].read[done:common]], device=model.device)
        output = model(
            **with_cache(model, ids_BS, torch.ones(1, common, dtype=torch.int64), cache), use_cache=True, logits_to_keep=1
        )
        cache = cache_of(output)
    leaves: list[_Reading] = []
    for group in _groups(texts, common, worth):
        if len(group) < len(texts) and _saved(group, common) > worth:
            yield from _go_on(model, group, copy.deepcopy(cache), common, worth)
        else:
            leaves += group
    yield from _read(model, leaves, cache, common)


def _read(
    model: PreTrainedModel, texts: Sequence[_Reading], cache: Cache | None, done: int
) -> Iterator[tuple[dict[Continuation, Answer], int]]:
    """Answer texts, batched by length, whose first `done` tokens the cache holds."""
    sequences = [TokenSequence(text.read[done:], 0) for text in texts]
    for batch in make_batches(sequences, tokens=tokens_per_pass(model.config)):
        rows = [texts[row] for row in batch.rows]
        repeated = copy.deepcopy(cache)
        if repeated is not None:
            repeated.batch_repeat_interleave(len(rows))
        ids_BS = batch.input_ids.to(model.device)
        mask_BS = torch.cat([torch.ones(len(rows), done, dtype=torch.int64), batch.mask.long()], 1)
        first = min(text.first for text in rows) - done
        logits_BKV = _logits(model, ids_BS, mask_BS, first, repeated)
        yield _answers(rows, ids_BS, logits_BKV, first, done), sum(text.tokens for text in rows)


def _logits(
    model: PreTrainedModel, ids_BS: torch.Tensor, mask_BS: torch.Tensor, first: int, cache: Cache | None = None
) -> torch.Tensor:
    """Logits (B, K, V) from place `first` on: the head is a fifth of a small model."""
    kept = ids_BS.shape[1] - first
    logits_BKV: torch.Tensor = model(
        **with_cache(model, ids_BS, mask_BS, cache), use_cache=cache is not None, logits_to_keep=kept
    ).logits
    return logits_BKV[:, -kept:]


def _answers(
    texts: Sequence[_Reading], ids_BS: torch.Tensor, logits_BKV: torch.Tensor, first: int, done: int
) -> dict[Continuation, Answer]:
    """What rows say of all that is asked of them; `done` tokens stand before the rows."""
    answers: dict[Continuation, Answer] = {}
    for place, text in enumerate(texts):
        for each in text.asked:
            start, stop = each.start - 1 - done - first, len(each.ids) - 1 - done - first
            target = torch.tensor(each.ids[each.start :], device=ids_BS.device)
            log_p = logits_BKV[place, start:stop].float().log_softmax(-1)
            likeliest = bool((log_p.argmax(-1) == target).all())
            answers[each] = (float(log_p.gather(1, target[:, None]).double().sum()), likeliest)
    return answers
