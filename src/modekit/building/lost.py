"""What a plain checkpoint will lose of its experts, measured before it is written as `modekit verify --deep` does afterwards.

    lost = KL(own || carried) / KL(own || base)

over the beginnings of every domain's own fit text. The base's class computes with an expert's own numbers, and with those that
come through the channels.

Shape legend: N predicted tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from modekit.building.carrying import Carrying
from modekit.building.differences import Differences
from modekit.checkpoint.carried import Carried
from modekit.evaluation.forced import SAME, divergence
from modekit.loaded.load import load_model
from modekit.loaded.passes import predicted_logits
from modekit.planning.carry import LOST_TOKENS
from modekit.planning.plan import Plan
from modekit.routing.stream import beginnings
from modekit.run import Run
from modekit.sources.names import HEAD, weight_of
from modekit.text.sequences import TokenSequence, make_batches
from modekit.weights.numeric import Singles
from modekit.weights.reading import WeightReader


def measure_lost(plan: Plan, read: WeightReader, carried: Carried, kept: Path, run: Run) -> tuple[float, ...]:
    """Per expert; of the base itself over what the others differ by on average. Raises SourceError and TextError."""
    model = load_model(plan.sources[0].folder, run=run)  # in bfloat16 a whole LoRA would seem to lose 0.7 % (SmolLM2)
    rows = model.get_input_embeddings().weight.shape[0]
    texts = [_beginning(each) for each in beginnings(plan, kept, rows, run)]
    apart, experts = list[tuple[float, float]](), _Experts(plan, read, carried)
    for expert, text in run.over("measure what is carried", list(enumerate(texts)), len(texts)):
        _set(model, experts.own(expert))
        own = _logits(model, text)
        _set(model, experts.carried(expert))
        lost = _divergence(own, _logits(model, text))
        _set(model, experts.own(-1))  # the base's, which lies before the experts
        apart.append((lost, _divergence(own, _logits(model, text))))
    changed = [total for _, total in apart if total > SAME]
    usual = sum(changed) / len(changed) if changed else 1.0
    return tuple(round(lost / (total if total > SAME else usual), 4) for lost, total in apart)


class _Experts:
    """The numbers of experts, by what the base's class calls them."""

    def __init__(self, plan: Plan, read: WeightReader, carried: Carried) -> None:
        self._differences, self._carrying = Differences(plan, read), Carrying(plan, read, carried)
        self._names, routed = plan.family.own_names(plan.sources[0]), plan.shape.routed
        self._ffn = (f".{plan.family.decoder.ffn}.",) if routed is None else tuple(f".{path}" for path in routed.own)

    def own(self, expert: int) -> Iterator[tuple[str, Singles]]:
        """All of an expert's own."""
        yield from ((name, self._differences.own(name, expert)) for name in self._names)
        yield weight_of(HEAD), self._differences.own(self._differences.head, expert)

    def carried(self, expert: int) -> Iterator[tuple[str, Singles]]:
        """Those that are others in the result: FFNs of their own and the norms before them stay."""
        norms = {self._differences.ffn_norm_name(layer) for layer in range(self._differences.layers)}
        own = {name for name in self._names if any(part in name for part in self._ffn)}
        shared = [name for name in self._names if name not in own | norms]
        yield from ((name, self._differences.shared(name)) for name in shared)
        yield weight_of(HEAD), self._differences.shared(self._differences.head)
        yield from self._carrying.through(expert)


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
