"""What a plain checkpoint will lose of its experts, measured before it is written as `modekit verify --deep` does afterwards.

    lost = sum_t min(1, KL(own || written)) / sum_t min(1, KL(own || base))        over tokens t, KL in nats

over pieces of every domain's own fit text that did not set what is carried. The base's class computes with an
expert's own numbers, and then, as wide as the result, with those that its files will have: rounded as they are,
and all that channels change. A few pieces are enough where the answer is clear; else more are read.

Shape legend: N predicted tokens, V vocabulary, P pieces.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from modekit.building.carrying import Carrying
from modekit.building.differences import Differences
from modekit.checkpoint.carried import Carried, Lost
from modekit.evaluation.forced import MOST_NATS, divergences
from modekit.evaluation.forced_results import SAME
from modekit.loaded.layers import LayerByLayer, Weights, by_layer
from modekit.loaded.native import own_ffn
from modekit.loaded.passes import predicted_logits
from modekit.planning.carry import LOST_AT_ONCE, LOST_TOKENS, PIECE_TOKENS
from modekit.planning.plan import Plan
from modekit.recipes.layers import Layer
from modekit.routing.stream import base_by_layers
from modekit.run import Run
from modekit.text.sequences import NO_LABEL, Batch, TokenSequence, make_batches
from modekit.weights.numeric import as_array, to_bytes, to_float32
from modekit.weights.reading import WeightReader

_FEWEST_PIECES = 8
_ROUNDS = ((LOST_AT_ONCE, 72), (LOST_TOKENS, PIECE_TOKENS))
"""Tokens of a domain, and of a piece: the second where the first leaves it open whether too much is lost."""


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
        for expert in run.over("measure what is lost", unclear, len(unclear)):
            measured[expert] = models.compare(expert, first_pieces(pieces[expert], tokens, longest))
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

    def compare(self, expert: int, text: Sequence[TokenSequence]) -> _Measured:
        """What is lost of an expert, piece by piece."""
        sums_3P = torch.zeros((3, len(text)), dtype=torch.float64)
        own_numbers_of = own_numbers(self._plan, self._differences, expert)
        base_numbers = own_numbers(self._plan, self._differences, -1)
        self._written.expert = expert
        for batch in make_batches(text, tokens=LOST_AT_ONCE * 3 // 2):  # of pieces of other lengths a third may be padding
            own_NV = _logits(self._narrow, batch, own_numbers_of)
            base_N = torch.zeros(len(own_NV), dtype=torch.float64)
            if not self._plan.recipe.experts[expert].is_base:
                base_N = _divergence(own_NV, _logits(self._narrow, batch, base_numbers))
            lost_N = _divergence(own_NV, _logits(self._wide, batch, self._written.weights))
            row_N = (batch.labels != NO_LABEL).nonzero()[:, 0]
            piece_N = torch.tensor(batch.rows)[row_N]
            sums_3P.index_add_(1, piece_N, torch.stack([lost_N, base_N, torch.ones_like(lost_N)]))
        return _Measured(*sums_3P)


def _logits(layers: LayerByLayer, batch: Batch, weights: Weights) -> torch.Tensor:
    """Of every predicted token (N, V); no weight stays in memory."""
    layers.use(weights)
    with torch.inference_mode():
        logits_NV = predicted_logits(layers.model, batch)
    layers.let_go()
    return logits_NV


def _divergence(own_NV: torch.Tensor, other_NV: torch.Tensor) -> torch.Tensor:
    """KL(own || other) of every token (N,), one nat at most."""
    [(kl_N, _)] = divergences(own_NV, other_NV)
    return kl_N.clamp_max(MOST_NATS)


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
        self._plan, self._read, self.expert = plan, read, 0
        read.fills = Carrying(plan, read, carried).fill

    def weights(self, layer: Layer | None) -> Iterator[tuple[str, torch.Tensor]]:
        """What all share, and what is the expert's own."""
        yield from ((name, self._numbers(name)) for name in self._shared.get(layer, []))
        if isinstance(layer, int):
            yield from own_ffn(self._plan.shape, layer, self.expert, self._numbers)

    def _numbers(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        """Of a tensor, or of some rows of its first axis, as its dtype has them."""
        tensor = self._tensors[name]
        (first, last, _), size = rows.indices(tensor.shape[0]), math.prod(tensor.shape[1:])
        numbers = to_float32(tensor.made.numbers(self._read)[first * size : last * size])
        rounded = to_float32(as_array(to_bytes(numbers, tensor.dtype), tensor.dtype))
        return torch.from_numpy(rounded).view(-1, *tensor.shape[1:])
