"""Text that a model writes, sampled in batches with a cache: against the base, what sets the model apart from it comes first.

    logits = z + w (log p - log p_base),   among tokens of at least a hundredth of the likeliest one's probability

with z and p of the model (contrastive decoding, arXiv 2210.15097, with temperature 1 and sampling in place of a search).

Shape legend: B rows of a batch, S tokens that are fed at once, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from modekit.errors import SourceError

_LEAST = math.log(0.01)
"""Log of the smallest probability that is written, as a share of the likeliest token's."""
_CACHE_BYTES = 2**29
"""Of the keys and values of a batch, in both models; no less than one row."""
_MOST_ROWS = 32
_READ_ROWS = 4  # whose logits are kept for every token


@dataclass(frozen=True)
class Script:
    """What a text is written into: `fixed` tokens, behind each of which the model writes at most as many as `free` says."""

    fixed: tuple[tuple[int, ...], ...]
    free: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """The most that a row has."""
        return sum(map(len, self.fixed)) + sum(self.free)


@dataclass
class _Row:
    """One text in the making: what is still fixed, and the parts that were written."""

    script: Script
    parts: list[list[int]] = field(default_factory=lambda: [[]])
    forced: list[int] = field(default_factory=list)
    done: bool = False

    def take(self, sampled: int, ends: Collection[int]) -> int:
        """The token that follows: one that is fixed, else the sampled one."""
        if self.done or self.forced:
            return self.forced.pop(0) if self.forced else sampled
        part, place = self.parts[-1], len(self.parts) - 1
        if sampled not in ends:
            part.append(sampled)
            if len(part) < self.script.free[place]:
                return sampled
        if len(self.parts) == len(self.script.free):
            self.done = True
            return sampled
        self.parts.append([])
        self.forced = list(self.script.fixed[place + 1])
        return self.forced.pop(0) if sampled in ends and self.forced else sampled


def rows_at_once(model: PreTrainedModel, tokens: int) -> int:
    """Texts of so many tokens that are written at once, by what the keys and values of two models take in float32."""
    config = model.config.get_text_config()
    heads = int(getattr(config, "num_attention_heads", None) or 1)
    shared = heads // int(getattr(config, "num_key_value_heads", None) or heads)
    row = 2 * 4 * 2 * int(config.hidden_size) * int(config.num_hidden_layers) * tokens // max(1, shared)
    return max(1, min(_MOST_ROWS, _CACHE_BYTES // row))


@dataclass(frozen=True)
class Writer:
    """A model that writes, and the base that it writes against with a weight, if there is one.

    Ids of the `vocabulary` and above are never written; those in `ends` end a part, and where it is `endless` are not written.
    `where`: of errors.
    """

    model: PreTrainedModel
    base: PreTrainedModel | None
    against: float
    ends: Collection[int]
    vocabulary: int
    endless: bool = False
    where: str = ""

    @torch.inference_mode()
    def write(self, script: Script, rows: int, seed: int, begun: Sequence[Sequence[int]] = ()) -> list[list[list[int]]]:
        """The parts of so many texts, as token ids; `begun` stands in place of the first that is fixed, all of equal length.

        Raises SourceError where a model computes NaN or Inf.
        """
        draw = torch.Generator().manual_seed(seed)
        ids_BS = torch.tensor(list(map(list, begun)) or [list(script.fixed[0])] * rows)
        texts = [_Row(script) for _ in range(len(ids_BS))]
        read = [_Reader(model) for model in (self.model, self.base) if model is not None]
        for _ in range(script.tokens):
            probabilities_BV = self._probabilities([each.logits(ids_BS) for each in read])
            sampled = torch.multinomial(probabilities_BV, 1, generator=draw)[:, 0].tolist()
            ids_BS = torch.tensor([[row.take(token, self.ends)] for row, token in zip(texts, sampled, strict=True)])
            if all(row.done for row in texts):
                break
        return [row.parts for row in texts]

    def _probabilities(self, logits: Sequence[torch.Tensor]) -> torch.Tensor:
        own_BV, *others = (each[:, : self.vocabulary].log_softmax(-1) for each in logits)
        if any(each.isnan().any() for each in (own_BV, *others)):
            raise SourceError(
                "a model computes NaN or Inf", where=self.where, remedy="it is damaged: save or download it again"
            )
        own_BV[:, sorted(self.ends) if self.endless else []] = -math.inf
        log_p_BV = own_BV
        for base_BV in others:
            more_BV = torch.zeros_like(own_BV)
            more_BV[:, : base_BV.shape[1]] = own_BV[:, : base_BV.shape[1]] - base_BV  # nothing of tokens that the base lacks
            log_p_BV = own_BV + self.against * more_BV
        return log_p_BV.masked_fill(own_BV < own_BV.amax(-1, keepdim=True) + _LEAST, -math.inf).softmax(-1)


@torch.inference_mode()
def read_texts(model: PreTrainedModel, texts_BS: torch.Tensor, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a model expects of texts: how often each token (V,) follows, its probabilities added, and log p of what follows each
    token but the last, (B, S - 1).
    """
    expected_V, found = torch.zeros(()), list[torch.Tensor]()
    for ids_BS in torch.split(texts_BS.to(model.device), _READ_ROWS):
        output = model(input_ids=ids_BS, attention_mask=torch.ones_like(ids_BS), use_cache=False)
        log_p_BSV = output.logits[:, :-1].float().log_softmax(-1)
        expected_V = expected_V + log_p_BSV[..., :vocabulary].exp().sum((0, 1)).cpu()
        found.append(log_p_BSV.gather(-1, ids_BS[:, 1:, None])[..., 0].cpu())
    return expected_V, torch.cat(found)


class _Reader:
    """A model that reads rows token by token; one that keeps no cache reads them from the beginning each time."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        # transformers named it anew in 5.20
        self._name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        self._cache: dict[str, Cache] = {}
        self._read_BS: torch.Tensor | None = None

    def logits(self, ids_BS: torch.Tensor) -> torch.Tensor:
        """Of what follows further tokens, (B, V), float32, on the processor."""
        ids_BS = ids_BS.to(self._model.device)
        self._read_BS = ids_BS if self._read_BS is None else torch.cat([self._read_BS, ids_BS], 1)
        output = self._model(
            input_ids=ids_BS if self._cache else self._read_BS,
            attention_mask=torch.ones_like(self._read_BS),
            use_cache=True,
            logits_to_keep=1,
            **self._cache,
        )
        caches = [value for value in output.values() if isinstance(value, Cache)]
        self._cache = {self._name: caches[0]} if caches else {}
        logits_BV: torch.Tensor = output.logits[:, -1]
        return logits_BV.float().cpu()
