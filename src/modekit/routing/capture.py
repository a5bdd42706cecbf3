"""What routers really read: the input of every router, averaged as its gate takes it, pads excluded, summed in blocks.

Shape legend: B batch, S sequence, D width of what a gate takes (its parts side by side), T real tokens of a batch, N kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from modekit.architecture.modekit_router import causal_average
from modekit.loaded.mixture import ExpertView
from modekit.processes import ALONE, Processes, processes
from modekit.routing.statistics import DomainStatistics, SlotStatistics
from modekit.text.sequences import TokenSequence, make_batches

_LARGEST = torch.finfo(torch.float16).max  # where a family's FFN reads an unnormalised stream, outliers may be larger


def to_float16(x: torch.Tensor) -> torch.Tensor:
    """Activations as they are kept: float16 on the CPU, outliers at its largest number."""
    return x.clamp(-_LARGEST, _LARGEST).to("cpu", torch.float16)


Consume = Callable[[int, torch.Tensor, torch.Tensor], None]
"""(slot, x (T, D), places (T,)): the real tokens of a batch, and their places in the order of the sequences."""


class _Sums:
    """Sums and kept tokens of one router while a text runs through."""

    def __init__(self, width: int, kept_places: torch.Tensor) -> None:
        self._places = kept_places
        self.sum_D = torch.zeros(width, dtype=torch.float64)
        self.outer_DD = torch.zeros((width, width), dtype=torch.float64)
        self.sample_ND = torch.zeros((len(kept_places), width), dtype=torch.float16)

    def add(self, x_TD: torch.Tensor, places_T: torch.Tensor) -> None:
        """Take the tokens of a batch."""
        self.sum_D += x_TD.sum(0, dtype=torch.float64).cpu()
        self.outer_DD += (x_TD.T @ x_TD).cpu()  # float32 within a batch, float64 across batches
        if not len(self._places):
            return
        slots = torch.searchsorted(self._places, places_T)
        found = (slots < len(self._places)) & (self._places[slots.clamp(max=len(self._places) - 1)] == places_T)
        self.sample_ND[slots[found]] = to_float16(x_TD[found.to(x_TD.device)])

    def add_up(self, shared: Processes) -> None:
        """Take what the other processes found."""
        self.sum_D = shared.add_up(self.sum_D)
        self.outer_DD = shared.add_up(self.outer_DD)
        if shared.count > 1:  # each kept token was seen by one process, and is zero in the others
            self.sample_ND = shared.add_up(self.sample_ND.float()).half()


@dataclass(frozen=True)
class GateInput:
    """What a gate takes of x: causal averages side by side, and the prefix after which they stay; as the routing has them
    (architecture/modekit_router.py). `source` is what the statistics will say of themselves.
    """

    averages: Sequence[Mapping[str, Any]]
    prefix: int | None
    source: Mapping[str, Any]


def capture_domain(
    view: ExpertView,
    sequences: Sequence[TokenSequence],
    negatives: Sequence[TokenSequence],
    *,
    reads: Sequence[GateInput],
    keep_tokens: int,
    advance: Callable[[int], None],
) -> list[DomainStatistics]:
    """Run a domain's text through its own expert and sum what every router's gate would take, in each of several ways.

    `advance` is called with the number of tokens done after each batch. Which tokens are kept depends on their place in
    `sequences` alone, so neither padding nor the order of batches changes the result beyond rounding. Under a launcher every
    process runs its share of the sequences, and what they found is added up.
    """
    shared = processes()
    total = sum(len(sequence.ids) for sequence in sequences)
    kept = min(keep_tokens, total)
    places = torch.linspace(0, total - 1, kept, dtype=torch.float64).round().long() if kept else torch.empty(0).long()
    sums: list[dict[int, _Sums]] = [{} for _ in reads]

    def consume(number: int, slot: int, x_TD: torch.Tensor, places_T: torch.Tensor) -> None:
        if slot not in sums[number]:
            sums[number][slot] = _Sums(x_TD.shape[1], places)
        sums[number][slot].add(x_TD, places_T)

    _run_with_inputs(view, sequences, reads, consume, advance, shared)
    for found in sums:
        for slot, width in enumerate(shared.agree([len(found[slot].sum_D) for slot in sorted(found)])):
            found.setdefault(slot, _Sums(width, places)).add_up(shared)  # a process may have had no sequence
    negative = [{slot: torch.zeros_like(each.sum_D) for slot, each in found.items()} for found in sums]
    if negatives:
        count = sum(len(sequence.ids) for sequence in negatives)

        def consume_negative(number: int, slot: int, x_TD: torch.Tensor, _places_T: torch.Tensor) -> None:
            negative[number][slot] += x_TD.sum(0, dtype=torch.float64).cpu() / count

        _run_with_inputs(view, negatives, reads, consume_negative, lambda _: None)
    return [
        DomainStatistics(
            total,
            tuple(
                SlotStatistics(found[slot].sum_D, found[slot].outer_DD, negative[number][slot], found[slot].sample_ND)
                for slot in sorted(found)
            ),
            dict(read.source),
        )
        for number, (read, found) in enumerate(zip(reads, sums, strict=True))
    ]


def run_with_inputs(
    view: ExpertView,
    sequences: Sequence[TokenSequence],
    averages: Sequence[Mapping[str, Any]],
    prefix: int | None,
    consume: Consume,
    advance: Callable[[int], None],
) -> None:
    """Forward passes over all sequences; `consume` gets what every router's gate takes of each batch's real tokens."""
    read = GateInput(averages, prefix, {})
    _run_with_inputs(view, sequences, [read], lambda _number, *taken: consume(*taken), advance)


def _run_with_inputs(
    view: ExpertView,
    sequences: Sequence[TokenSequence],
    reads: Sequence[GateInput],
    consume: Callable[[int, int, torch.Tensor, torch.Tensor], None],
    advance: Callable[[int], None],
    shared: Processes = ALONE,
) -> None:
    """The same for several ways to read; `consume` is told which."""
    # By length, so that the shares cost the same.
    mine = sorted(range(len(sequences)), key=lambda row: (-len(sequences[row].ids), row))[shared.rank :: shared.count]
    starts = torch.tensor([0, *(len(sequence.ids) for sequence in sequences)]).cumsum(0)
    mask: torch.Tensor | None = None
    whole = False  # no pads in the batch: nothing to pick out
    places_T: torch.Tensor | None = None

    def hook(slot: int) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def read(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            assert mask is not None and places_T is not None
            for number, each in enumerate(reads):
                x_BSD = averaged(args[0].detach().float(), mask.to(args[0].device), each.averages, each.prefix)
                consume(number, slot, x_BSD.flatten(0, 1) if whole else x_BSD[mask], places_T)

        return read

    handles = [module.register_forward_pre_hook(hook(slot)) for slot, module in enumerate(view.router_inputs())]
    device = view.model.device
    try:
        with torch.inference_mode():
            for batch in make_batches([sequences[row] for row in mine]):
                mask, whole = batch.mask.to(device), bool(batch.mask.all())
                within = torch.arange(batch.mask.shape[1])
                places_T = (starts[torch.tensor([mine[row] for row in batch.rows])][:, None] + within)[batch.mask]
                # Only the decoder runs: the head's logits are not needed, and cost a third of a small model's pass.
                view.model.model(input_ids=batch.input_ids.to(device), attention_mask=mask.long(), use_cache=False)
                advance(int(batch.mask.sum()))
    finally:
        for handle in handles:
            handle.remove()


def averaged(
    x_BSD: torch.Tensor, mask_BS: torch.Tensor, averages: Sequence[Mapping[str, Any]], prefix: int | None
) -> torch.Tensor:
    """What a gate takes: the causal averages of x side by side, (B, S, J D). A gate is linear, so that averaging what it
    reads, as here, is averaging what it says, as the router does.
    """
    parts = [
        x_BSD
        if average["decay"] is None
        else causal_average(x_BSD, mask_BS.to(x_BSD), average["decay"], None, prefix=prefix)[0]
        for average in averages
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
