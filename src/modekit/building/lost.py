"""What a plain checkpoint will lose of its experts, measured before it is written as `modekit verify --deep` does afterwards.

    lost = KL(own || written) / KL(own || base)

over the beginnings of every domain's own fit text. The base's class computes with an expert's own numbers, and then, as wide as
the result, with those that its files will have: rounded as they are, and all that channels change.

Shape legend: N predicted tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from modekit.building.carrying import Carrying
from modekit.building.differences import Differences
from modekit.checkpoint.carried import Carried
from modekit.evaluation.forced import SAME, divergence
from modekit.loaded.layers import LayerByLayer, Weights, by_layer
from modekit.loaded.native import own_ffn
from modekit.loaded.passes import predicted_logits
from modekit.planning.carry import LOST_TOKENS
from modekit.planning.plan import Plan
from modekit.recipes.layers import Layer
from modekit.routing.stream import base_by_layers, beginnings
from modekit.run import Run
from modekit.text.sequences import TokenSequence, make_batches
from modekit.weights.numeric import as_array, to_bytes, to_float32
from modekit.weights.reading import WeightReader


def measure_lost(plan: Plan, read: WeightReader, carried: Carried, kept: Path, run: Run) -> tuple[float, ...]:
    """Per expert; of the base itself over what the others differ by on average. Raises SourceError and TextError."""
    dense, channels = plan.family.dense_config(plan.sources[0].config), plan.shape.channels
    assert channels is not None
    # In bfloat16 a whole LoRA would seem to lose 0.7 % (SmolLM2).
    narrow, wide = base_by_layers(plan), LayerByLayer(dense, channels.widened(dense))
    rows = narrow.model.get_input_embeddings().weight.shape[0]
    texts = beginnings(plan, kept, rows, run, LOST_TOKENS)
    differences, written, apart = Differences(plan, read), _WrittenNumbers(plan, read, carried), list[tuple[float, float]]()
    wide.use(written.weights)
    for written.expert, text in run.over("measure what is lost", list(enumerate(texts)), len(texts)):
        narrow.use(own_numbers(plan, differences, written.expert))
        own = _logits(narrow.model, text)
        narrow.use(own_numbers(plan, differences, -1))
        apart.append((_divergence(own, _logits(wide.model, text)), _divergence(own, _logits(narrow.model, text))))
    changed = [total for _, total in apart if total > SAME]
    usual = sum(changed) / len(changed) if changed else 1.0
    return tuple(round(lost / (total if total > SAME else usual), 4) for lost, total in apart)


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


def _logits(model: PreTrainedModel, text: Sequence[TokenSequence]) -> list[torch.Tensor]:
    """Of every predicted token, batch by batch (N, V)."""
    with torch.inference_mode():
        return [predicted_logits(model, batch) for batch in make_batches(text, tokens=2 * LOST_TOKENS)]


def _divergence(own: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    """In nats per token."""
    return sum(divergence(*pair)[0] for pair in zip(own, other, strict=True)) / max(1, sum(map(len, own)))
