"""What routers really read: the input of every router, averaged as its gate takes it, pads excluded, summed in blocks.

Of a pair a router reads one side: in the encoder the source, all of which it sees at once, and in the decoder the target.

Shape legend: B batch, S sequence (in a decoder the target), D width of what a gate takes (its parts side by side), T real
tokens of a batch, N kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn

from modekit.architecture.modekit_router import causal_average
from modekit.architecture.modekit_scores import segment_means
from modekit.loaded.mixture import ExpertView
from modekit.loaded.passes import check_text, has_encoder, run_backbone, tokens_per_batch
from modekit.processes import ALONE, Processes, processes
from modekit.routing.kept import Provenance
from modekit.routing.statistics import DomainStatistics, SlotStatistics
from modekit.text.sequences import TokenSequence, make_batches

_LARGEST = torch.finfo(torch.float16).max  # where a family's FFN reads an unnormalised stream, outliers may be larger


def to_float16(x: torch.Tensor) -> torch.Tensor:
    """Activations as they are kept: float16 on the CPU, outliers at its largest number."""
    return x.clamp(-_LARGEST, _LARGEST).to("cpu", torch.float16)


Averages = Sequence[Mapping[str, float | None]]
"""As `modekit.routing` of a config says them (planning/mixture_config.py)."""
Consume = Callable[[int, int, torch.Tensor, torch.Tensor], None]
"""(place of the way to read, slot, x (T, D), places (T,)): the real tokens of a batch, and their places in the order of the
sequences, of the sources' tokens alone, or the targets'.
"""


class _Sums:
    """Sums and kept tokens of one router while a text runs through."""

    def __init__(self, width: int, kept_places: torch.Tensor) -> None:
        self._places = kept_places
        self.sum_D = torch.zeros(width, dtype=torch.float64)
        self.sample_ND = torch.zeros((len(kept_places), width), dtype=torch.float16)

    def add(self, x_TD: torch.Tensor, places_T: torch.Tensor) -> None:
        """Take the tokens of a batch."""
        self.sum_D += x_TD.sum(0, dtype=torch.float64).cpu()
        if not len(self._places):
            return
        slots = torch.searchsorted(self._places, places_T)
        found = (slots < len(self._places)) & (self._places[slots.clamp(max=len(self._places) - 1)] == places_T)
        self.sample_ND[slots[found]] = to_float16(x_TD[found.to(x_TD.device)])

    def add_up(self, shared: Processes) -> None:
        """Take what the other processes found."""
        self.sum_D = shared.add_up(self.sum_D)
        if shared.count > 1:  # each kept token was seen by one process, and is zero in the others
            self.sample_ND = shared.add_up(self.sample_ND.float()).half()


@dataclass(frozen=True)
class GateInput:
    """What a gate takes of x: causal averages side by side, and the prefix after which they stay; as the routing has them
    (architecture/modekit_router.py). `source` is what the statistics will say of themselves.
    """

    averages: Averages
    prefix: int | None
    source: Provenance


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

    `advance` is called with 0 before the first batch, and with the number of tokens after each. Which tokens are kept depends
    on their place in `sequences` alone, so neither padding nor the order of batches changes the result beyond rounding. Under a
    launcher every process runs its share of the sequences, and what they found is added up.
    """
    shared, sides = processes(), view.in_decoder()
    check_text(view.model, [*sequences, *negatives])
    totals = [sum(sizes) for sizes in _sizes(sequences)]
    kept = [_evenly(total, keep_tokens) for total in totals]
    sums: list[dict[int, _Sums]] = [{} for _ in reads]

    def consume(number: int, slot: int, x_TD: torch.Tensor, places_T: torch.Tensor) -> None:
        if slot not in sums[number]:
            sums[number][slot] = _Sums(x_TD.shape[1], kept[sides[slot]])
        sums[number][slot].add(x_TD, places_T)

    run_with_inputs(view, sequences, reads, consume, advance, shared)
    for found in sums:
        for slot, width in enumerate(shared.agree([len(found[slot].sum_D) for slot in sorted(found)])):
            found.setdefault(slot, _Sums(width, kept[sides[slot]])).add_up(shared)  # a process may have had no sequence
    negative = [{slot: torch.zeros_like(each.sum_D) for slot, each in found.items()} for found in sums]
    if negatives:
        counts = [sum(sizes) for sizes in _sizes(negatives)]

        def consume_negative(number: int, slot: int, x_TD: torch.Tensor, _places_T: torch.Tensor) -> None:
            negative[number][slot] += x_TD.sum(0, dtype=torch.float64).cpu() / counts[sides[slot]]

        run_with_inputs(view, negatives, reads, consume_negative, lambda _: None)
    return [
        DomainStatistics(
            sum(totals),
            tuple(SlotStatistics(found[slot].sum_D, negative[number][slot], found[slot].sample_ND) for slot in sorted(found)),
            dict(read.source),
            tuple(totals[sides[slot]] for slot in sorted(found)) if totals[True] else (),
        )
        for number, (read, found) in enumerate(zip(reads, sums, strict=True))
    ]


def _evenly(total: int, most: int) -> torch.Tensor:
    """Places of the tokens that are kept of so many."""
    kept = min(most, total)
    return torch.linspace(0, total - 1, kept, dtype=torch.float64).round().long() if kept else torch.empty(0).long()


def run_with_inputs(
    view: ExpertView,
    sequences: Sequence[TokenSequence],
    reads: Sequence[GateInput],
    consume: Consume,
    advance: Callable[[int], None],
    shared: Processes = ALONE,
) -> None:
    """Forward passes over all sequences; `consume` gets what every router's gate takes of each batch's real tokens."""
    # By length, so that the shares cost the same.
    mine = sorted(range(len(sequences)), key=lambda row: (-sequences[row].size, row))[shared.rank :: shared.count]
    starts = [torch.tensor([0, *sizes]).cumsum(0) for sizes in _sizes(sequences)]
    sides, encodes = view.in_decoder(), has_encoder(view.model)
    real: tuple[_Real, ...] = ()

    def hook(slot: int) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def read(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            own, taken = real[sides[slot]], args[0].detach().float()
            mask_BS = own.mask_BS.to(taken.device)
            for number, each in enumerate(reads):
                at_once = encodes and not sides[slot]
                x_BSD = averaged(taken, mask_BS, each.averages, each.prefix, at_once=at_once)
                consume(number, slot, x_BSD.flatten(0, 1) if own.unpadded else x_BSD[mask_BS], own.places_T)

        return read

    with ExitStack() as hooks, torch.inference_mode():
        for slot, module in enumerate(view.router_inputs()):
            hooks.enter_context(module.register_forward_pre_hook(hook(slot)))
        advance(0)
        for batch in make_batches([sequences[row] for row in mine], tokens=tokens_per_batch(view.model)):
            rows = torch.tensor([mine[row] for row in batch.rows])
            masks = (batch.mask, batch.target_mask)
            real = tuple(_Real.of(mask, each[rows], view.model.device) for mask, each in zip(masks, starts, strict=True))
            run_backbone(view.model, batch)
            advance(batch.tokens)


@dataclass(frozen=True)
class _Real:
    """Real tokens of one side of a batch: their mask (B, S) on the model's device, whether there are no pads to leave out, and
    the tokens' places (T,) among those of all sequences.
    """

    mask_BS: torch.Tensor
    unpadded: bool
    places_T: torch.Tensor

    @classmethod
    def of(cls, mask_BS: torch.Tensor, starts_B: torch.Tensor, device: torch.device) -> _Real:
        """Of rows whose first tokens have these places."""
        places_T = (starts_B[:, None] + torch.arange(mask_BS.shape[1]))[mask_BS]
        return cls(mask_BS.to(device), bool(mask_BS.all()), places_T)


def _sizes(sequences: Sequence[TokenSequence]) -> tuple[list[int], list[int]]:
    """Tokens of every source, or plain text, and of every target."""
    return [len(sequence.ids) for sequence in sequences], [len(sequence.target) for sequence in sequences]


def averaged(
    x_BSD: torch.Tensor, mask_BS: torch.Tensor, averages: Averages, prefix: int | None, *, at_once: bool = False
) -> torch.Tensor:
    """What a gate takes: the causal averages of x side by side, (B, S, J D). A gate is linear, so that averaging what it
    reads, as here, is averaging what it says, as the router does.

    `at_once`: as in an encoder, which sees a source as a whole: every token has the averages that the last one has.
    """
    parts = []
    for average in averages:
        part = x_BSD
        if average["decay"] is not None:
            mask = mask_BS.to(x_BSD)
            part, _ = causal_average(x_BSD, mask, average["decay"], None, prefix=prefix)
            part = part[:, -1:].expand_as(x_BSD) if at_once else part  # pads behind a text change nothing
            if average.get("segment"):  # in a text's first segment, where nothing is decided, what was read so far
                length = int(average["segment"] or 0)
                part = torch.where(mask.cumsum(1)[..., None] <= length, part, segment_means(x_BSD, mask, None, length)[0])
        parts.append(part)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
