"""What a plain checkpoint will lose of its experts, measured before it is written as `modekit verify --deep` does afterwards.

    lost = KL(own || written) / KL(own || base)

over the beginnings of every domain's own fit text. The base's class computes with an expert's own numbers, and then, as wide as
the result, with those that its files will have: rounded as they are, and all that channels change.

Shape legend: N predicted tokens, V vocabulary, M experts that each expert has of its own, F hidden units, D hidden size, X
anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from modekit.building.carrying import Carrying
from modekit.building.differences import Differences
from modekit.checkpoint.carried import Carried
from modekit.evaluation.forced import SAME, divergence
from modekit.loaded.load import load_model
from modekit.loaded.native import dense_model
from modekit.loaded.passes import predicted_logits
from modekit.planning.carry import LOST_TOKENS
from modekit.planning.native_shape import NativeShape
from modekit.planning.plan import Plan
from modekit.routing.stream import beginnings
from modekit.run import Run
from modekit.sources.names import HEAD, in_layer, weight_of
from modekit.text.sequences import TokenSequence, make_batches
from modekit.weights.numeric import Singles, as_array, to_bytes, to_float32
from modekit.weights.reading import WeightReader

_STAGE = "measure what is carried"


def measure_lost(plan: Plan, read: WeightReader, carried: Carried, kept: Path, run: Run) -> tuple[float, ...]:
    """Per expert; of the base itself over what the others differ by on average. Raises SourceError and TextError."""
    channels = plan.shape.channels
    assert channels is not None
    model = load_model(plan.sources[0].folder, run=run)  # in bfloat16 a whole LoRA would seem to lose 0.7 % (SmolLM2)
    rows = model.get_input_embeddings().weight.shape[0]
    texts = [_beginning(each) for each in beginnings(plan, kept, rows, run)]
    differences, own, totals, steps = Differences(plan, read), list[list[torch.Tensor]](), list[float](), 2 * len(texts)
    for expert, text in enumerate(texts):
        run.progress(_STAGE, expert, steps)
        _set(model, _own(plan, differences, expert))
        own.append(_logits(model, text))
        _set(model, _own(plan, differences, -1))  # the base's, which lies before the experts
        totals.append(_divergence(own[-1], _logits(model, text)))
    del model
    written, lost = _WrittenNumbers(plan, read, carried), list[float]()
    state = {name: torch.from_numpy(numbers) for name, numbers in (*written.backbone(), *written.of(0))}
    dense = plan.family.dense_config(plan.sources[0].config)
    model = dense_model(dense, channels.widened(dense), state)
    del state
    for expert, text in enumerate(texts):
        run.progress(_STAGE, len(texts) + expert, steps)
        _set(model, written.of(expert))
        lost.append(_divergence(own[expert], _logits(model, text)))
    run.progress(_STAGE, steps, steps)
    changed = [total for total in totals if total > SAME]
    usual = sum(changed) / len(changed) if changed else 1.0
    return tuple(round(part / (total if total > SAME else usual), 4) for part, total in zip(lost, totals, strict=True))


def _own(plan: Plan, differences: Differences, expert: int) -> Iterator[tuple[str, Singles]]:
    """All of an expert's own numbers, by what the base's class calls them."""
    yield from ((name, differences.own(name, expert)) for name in plan.family.own_names(plan.sources[0]))
    yield weight_of(HEAD), differences.own(differences.head, expert)


class _WrittenNumbers:
    """The numbers that the result will have, by what the base's class calls them with one expert's in place of all."""

    def __init__(self, plan: Plan, read: WeightReader, carried: Carried) -> None:
        shards = plan.shards if plan.reused is None else plan.reused.otherwise
        self._tensors = {tensor.name: tensor for shard in shards for tensor in shard.tensors}
        self._plan, self._read = plan, read
        read.fills = Carrying(plan, read, carried).fill

    def backbone(self) -> Iterator[tuple[str, Singles]]:
        """What all share."""
        yield from ((name, self._numbers(name)) for name, tensor in self._tensors.items() if tensor.role == "backbone")

    def of(self, expert: int) -> Iterator[tuple[str, Singles]]:
        """An expert's FFNs; of one that is a mixture itself its experts and gates."""
        shape = self._plan.shape
        assert isinstance(shape, NativeShape) and shape.channels is not None
        native, routed, count = shape.native, shape.routed, max(1, shape.channels.inner)
        for layer in range(shape.channels.layers + 1):
            if native.fused is not None:
                both_MXD, down_MDF = (self._numbers(in_layer(layer, path), expert * count, count) for path in native.fused)
            else:
                paths = [in_layer(layer, str((native.experts or {})[part])) for part in ("gate", "up", "down")]
                numbers = range(expert * count, (expert + 1) * count)
                gate, up, down_MDF = (np.stack([self._numbers(path.format(expert=n)) for n in numbers]) for path in paths)
                both_MXD = np.concatenate([gate, up], axis=1)
            if routed is not None:
                yield in_layer(layer, routed.gate_up), both_MXD
                yield in_layer(layer, routed.down), down_MDF
                yield in_layer(layer, routed.gate), self._numbers(in_layer(layer, native.router), expert * count, count)
            else:
                parts = zip(("gate", "up", "down"), (*np.split(both_MXD[0], 2), down_MDF[0]), strict=True)
                yield from ((in_layer(layer, shape.family.decoder.mlp[part]), matrix) for part, matrix in parts)

    def _numbers(self, name: str, first: int = 0, count: int | None = None) -> Singles:
        """Of a tensor, or of so many rows of its first axis, as its dtype has them."""
        tensor = self._tensors[name]
        size, last = math.prod(tensor.shape[1:]), tensor.shape[0] if count is None else first + count
        numbers = to_float32(tensor.made.numbers(self._read)[first * size : last * size])
        return to_float32(as_array(to_bytes(numbers, tensor.dtype), tensor.dtype)).reshape(-1, *tensor.shape[1:])


def _beginning(sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
    found, left = list[TokenSequence](), LOST_TOKENS
    for each in sequences:
        found += [TokenSequence(each.ids[:left])] if left > 1 else []
        left -= len(each.ids)
    return found


def _logits(model: PreTrainedModel, text: Sequence[TokenSequence]) -> list[torch.Tensor]:
    """Of every predicted token, batch by batch (N, V)."""
    with torch.inference_mode():
        return [predicted_logits(model, batch) for batch in make_batches(text, tokens=2 * LOST_TOKENS)]


def _divergence(own: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    """In nats per token."""
    return sum(divergence(*pair)[0] for pair in zip(own, other, strict=True)) / max(1, sum(map(len, own)))


def _set(model: PreTrainedModel, numbers: Iterable[tuple[str, Singles]]) -> None:
    """Let parameters be these; a head that was the embedding is one of its own from then on."""
    for name, array in numbers:
        parameter = nn.Parameter(torch.tensor(array, device=model.device), requires_grad=False)
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, parameter)
