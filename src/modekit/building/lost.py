"""What a plain checkpoint will lose of its experts, measured before it is written as `modekit verify --deep` does afterwards.

    lost = sum_t min(1, KL(own || written)) / sum_t min(1, KL(own || base))        over tokens t, KL in nats

over pieces of every domain's own fit text that did not set what is carried. The base's class computes with an
expert's own numbers, and then, as wide as the result, with those that its files will have: rounded as they are,
and all that channels change. A few pieces are enough where the answer is clear; else more are read.

Shape legend: N predicted tokens, V vocabulary, P pieces.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from modekit.building.carrying import Carrying
from modekit.building.differences import Differences
from modekit.checkpoint.carried import Carried, Lost
from modekit.evaluation.forced import MOST_NATS, divergences
from modekit.evaluation.forced_results import SAME
from modekit.loaded.head import Head
from modekit.loaded.layers import LayerByLayer, Weights, by_layer
from modekit.loaded.load import decoder_layers
from modekit.loaded.native import own_ffn
from modekit.loaded.passes import backbone_of, inputs_of
from modekit.planning.carry import LOST_TOKENS, PIECE_TOKENS
from modekit.planning.plan import Plan
from modekit.recipes.layers import Layer
from modekit.routing.stream import base_by_layers
from modekit.run import Run
from modekit.text.sequences import NO_LABEL, TokenSequence, make_batches
from modekit.weights.numeric import BLOCK, rounded, to_float32
from modekit.weights.reading import WeightReader

_FEWEST_PIECES = 8
_ROUNDS = ((384, 48), (LOST_TOKENS, PIECE_TOKENS))
"""Tokens of a domain, and of a piece: the second where the first leaves it open whether too much is lost."""
_TOKENS_OF_PASS, _LOGITS_AT_ONCE = 4_096, 64
"""Tokens that run at once, as numbers of a layer are made for each pass; and of which there are logits in memory."""


def measure_lost(
    plan: Plan, read: WeightReader, carried: Carried, pieces: Sequence[Sequence[TokenSequence]], run: Run
) -> tuple[Lost, ...]:
    """Per expert; of the base itself over what the others differ by on average. The first of its domain's `pieces` are read.
    Raises SourceError.
    """
    models = _Models(plan, read, carried)
    measured: dict[int, _Measured] = {}
    lost: list[Lost] = []
    for tokens, longest in _ROUNDS:
        unclear = [expert for expert in range(len(pieces)) if not lost or not lost[expert].is_clear]
        texts = {expert: first_pieces(pieces[expert], tokens, longest) for expert in unclear}
        measured |= models.compare(texts, run) if texts else {}
        changed = [each.base for each in measured.values() if each.base > SAME]
        usual = sum(changed) / len(changed) if changed else 1.0
        lost = [measured[expert].over(usual) for expert in range(len(pieces))]
    return tuple(lost)


def first_pieces(pieces: Sequence[TokenSequence], tokens: int, longest: int) -> list[TokenSequence]:
    """The first of them that have so many tokens, cut to `longest` each."""
    taken, total = list[TokenSequence](), 0
    for piece in pieces:
        if total >= tokens and len(taken) >= _FEWEST_PIECES:
            break
        taken.append(TokenSequence(piece.ids[:longest], piece.start))
        total += taken[-1].size
    return taken


@dataclass(frozen=True)
class _Measured:
    """Of one expert: by piece what is lost, how far its base is (P,), and its tokens, as sums in nats."""

    lost_P: torch.Tensor
    base_P: torch.Tensor
    tokens_P: torch.Tensor

    @property
    def base(self) -> float:
        """KL(own || base), per token."""
        return float(self.base_P.sum() / self.tokens_P.sum().clamp_min(1))

    def over(self, usual: float) -> Lost:
        """As shares of what the expert differs by; of the base itself, of the `usual` difference."""
        all_P = self.base_P if self.base > SAME else usual * self.tokens_P
        total, pieces = float(all_P.sum()), len(all_P)
        share = float(self.lost_P.sum()) / max(total, SAME)
        # The error of a ratio of sums over pieces.
        variance = float((self.lost_P - share * all_P).square().sum()) * pieces / max(1, pieces - 1)
        nats = float(self.lost_P.sum() / self.tokens_P.sum().clamp_min(1))
        return Lost(round(share, 4), round(math.sqrt(variance) / max(total, SAME), 4), round(nats, 6))


class _Read(NamedTuple):
    """What a model makes of texts: hidden states of predicted tokens by expert (N, D), and the head that reads them."""

    states: dict[int, torch.Tensor]
    head: Head


class _Models:
    """The base's class with an expert's own numbers, with the base's, and with those that files will have."""

    def __init__(self, plan: Plan, read: WeightReader, carried: Carried) -> None:
        dense, channels = plan.family.dense_config(plan.sources[0].config), plan.shape.channels
        assert channels is not None
        self._plan, self._differences = plan, Differences(plan, read)
        # In bfloat16 a whole LoRA would seem to lose 0.7 % (SmolLM2).
        self._narrow = base_by_layers(plan)
        self._wide = LayerByLayer(dense, channels.widened(dense))
        self._written = _WrittenNumbers(plan, read, carried)
        self._experts_of_rows: list[int] = []
        for number, layer in enumerate(decoder_layers(self._wide.model)):
            ffn = layer.get_submodule(plan.family.decoder.ffn)
            ffn.forward = partial(self._own_ffns, number, ffn.forward)

    def compare(self, texts: Mapping[int, Sequence[TokenSequence]], run: Run) -> dict[int, _Measured]:
        """What is lost of each expert on its text, piece by piece. Each model's numbers are made once."""
        stage, steps = "measure what is lost", len(texts) + 2
        run.begin(stage, steps)
        base = self._read(self._narrow, own_numbers(self._plan, self._differences, -1), texts)
        run.progress(stage, 1, steps)
        written = self._read(self._wide, self._written.shared, texts)
        measured: dict[int, _Measured] = {}
        for done, (expert, text) in enumerate(texts.items(), 2):
            run.progress(stage, done, steps)
            own = base
            if not self._plan.recipe.experts[expert].is_base:
                own = self._read(self._narrow, own_numbers(self._plan, self._differences, expert), {expert: text})
            kls_2N = _divergences(expert, own, (written, base))
            piece_N = torch.tensor([piece for piece, each in enumerate(text) for _ in range(each.scored)])
            sums_3P = torch.zeros((3, len(text)), dtype=torch.float64)
            sums_3P.index_add_(1, piece_N, torch.stack([*kls_2N, torch.ones_like(kls_2N[0])]))
            measured[expert] = _Measured(*sums_3P)
        run.progress(stage, steps, steps)
        return measured

    def _read(self, layers: LayerByLayer, weights: Weights, texts: Mapping[int, Sequence[TokenSequence]]) -> _Read:
        """In the order of the pieces and their tokens."""
        layers.use(weights)
        pieces = [(expert, piece) for expert, text in texts.items() for piece in text]
        found: dict[int, torch.Tensor] = {}
        for batch in make_batches([piece for _, piece in pieces], tokens=_TOKENS_OF_PASS):
            self._experts_of_rows = [pieces[row][0] for row in batch.rows]
            with torch.inference_mode():
                states_BSD = backbone_of(layers.model)(**inputs_of(layers.model, batch), use_cache=False)[0].cpu()
            for row, states_SD, labels_S in zip(batch.rows, states_BSD, batch.labels, strict=True):
                found[row] = states_SD[:-1][labels_S != NO_LABEL]
        read = _Read(
            {expert: torch.cat([found[row] for row, (whose, _) in enumerate(pieces) if whose == expert]) for expert in texts},
            Head(layers.model),
        )
        layers.let_go()
        return read

    def _own_ffns(self, layer: int, forward: Callable[..., torch.Tensor], x_BSD: torch.Tensor) -> torch.Tensor:
        """Every row by the FFN of its expert, one of which is in memory."""
        y_BSD = torch.empty_like(x_BSD)
        rows_by_expert: dict[int, list[int]] = {}
        for row, expert in enumerate(self._experts_of_rows):
            rows_by_expert.setdefault(expert, []).append(row)
        for expert, rows in rows_by_expert.items():
            self._wide.put(self._written.of_expert(layer, expert))
            y_BSD[rows] = forward(x_BSD[rows])
        return y_BSD


def _divergences(expert: int, own: _Read, others: Sequence[_Read]) -> list[torch.Tensor]:
    """KL(own || other) of every token (N,), one nat at most, of each of the others."""
    apart = [other for other in others if other is not own]
    kls_by_other: dict[int, list[torch.Tensor]] = {id(other): [] for other in apart}
    with torch.inference_mode():
        for hidden in zip(*(torch.split(each.states[expert], _LOGITS_AT_ONCE) for each in (own, *apart)), strict=True):
            logits = [read.head(hidden_ND) for read, hidden_ND in zip((own, *apart), hidden, strict=True)]
            for other, (kl_N, _) in zip(apart, divergences(*logits), strict=True):
                kls_by_other[id(other)].append(kl_N.clamp_max(MOST_NATS).cpu())
    none_N = torch.zeros(len(own.states[expert]), dtype=torch.float64)
    return [none_N if other is own else torch.cat(kls_by_other[id(other)]) for other in others]


def own_numbers(plan: Plan, differences: Differences, expert: int) -> Weights:
    """An expert's own, or those of the base, which lies before the experts (-1), by what the base's class calls them."""
    names = by_layer(plan.family.own_names(plan.sources[0]))
    return lambda layer: ((each, torch.from_numpy(differences.own(each, expert))) for each in names.get(layer, []))


class _WrittenNumbers:
    """The numbers that the result will have, by what the base's class calls them with one expert's in place of all."""

    def __init__(self, plan: Plan, read: WeightReader, carried: Carried) -> None:
        shards = plan.shards if plan.reused is None else plan.reused.otherwise
        self._tensors = {tensor.name: tensor for shard in shards for tensor in shard.tensors}
        self._shared = by_layer(name for name, tensor in self._tensors.items() if tensor.role == "backbone")
        self._plan, self._read = plan, read
        read.fills = Carrying(plan, read, carried).fill

    def shared(self, layer: Layer | None) -> Iterator[tuple[str, torch.Tensor]]:
        """What all experts share."""
        return ((name, self._numbers(name)) for name in self._shared.get(layer, []))

    def of_expert(self, layer: int, expert: int) -> Iterator[tuple[str, torch.Tensor]]:
        """The FFN of one expert in a layer."""
        return own_ffn(self._plan.shape, layer, expert, self._numbers)

    def _numbers(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        """Of a tensor, or of some rows of its first axis, as its dtype has them."""
        tensor = self._tensors[name]
        (first, last, _), size = rows.indices(tensor.shape[0]), math.prod(tensor.shape[1:])
        made, step = tensor.made.numbers(self._read), max(1, BLOCK // size)
        numbers = np.empty((last - first, size), np.float32)
        for start in range(first, last, step):
            stop = min(last, start + step)
            exact = to_float32(made[start * size : stop * size])
            numbers[start - first : stop - first] = rounded(exact, tensor.dtype).reshape(-1, size)
        return torch.from_numpy(numbers).view(-1, *tensor.shape[1:])
