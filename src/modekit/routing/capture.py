"""What a router really reads: the input of the FFN block of every layer, pads excluded, summed in blocks.

Shape legend: L layers, D hidden, T tokens of a batch that are real, N kept tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from modekit.data import TokenSequence, make_batches
from modekit.models import DenseView
from modekit.routing.statistics import DomainStatistics

_LARGEST = torch.finfo(torch.float16).max  # where a family's FFN reads an unnormalised stream, outliers may be larger


def capture_domain(
    view: DenseView,
    sequences: Sequence[TokenSequence],
    negatives: Sequence[TokenSequence],
    *,
    keep_tokens: int,
    source: Mapping[str, Any],
    advance: Callable[[int], None],
) -> DomainStatistics:
    """Run a domain's text through the dense view of its own expert and sum what every router would read.

    `advance` is called with the number of tokens done after each batch. Which tokens are kept depends on their place
    in `sequences` alone, so neither padding nor the order of batches changes the result beyond rounding.
    """
    layers, hidden = len(view.ffn_modules()), int(view.model.config.hidden_size)
    total = sum(len(sequence.ids) for sequence in sequences)
    kept = min(keep_tokens, total)
    kept_places = torch.linspace(0, total - 1, kept, dtype=torch.float64).round().long() if kept else torch.empty(0).long()
    sum_LD = torch.zeros((layers, hidden), dtype=torch.float64)
    outer_LDD = torch.zeros((layers, hidden, hidden), dtype=torch.float64)
    sample_LND = torch.zeros((layers, kept, hidden), dtype=torch.float16)

    def consume(layer: int, x_TD: torch.Tensor, places_T: torch.Tensor) -> None:
        x_TD = x_TD.float()
        sum_LD[layer] += x_TD.sum(0, dtype=torch.float64).cpu()
        outer_LDD[layer] += (x_TD.T @ x_TD).cpu()  # float32 within a batch, float64 across batches
        slots = torch.searchsorted(kept_places, places_T)
        hit = slots.clamp(max=max(kept - 1, 0))
        found = (slots < kept) & (kept_places[hit] == places_T) if kept else torch.zeros_like(places_T, dtype=torch.bool)
        sample_LND[layer, slots[found]] = x_TD[found.to(x_TD.device)].clamp(-_LARGEST, _LARGEST).to("cpu", torch.float16)

    run_with_inputs(view, sequences, consume, advance)
    negative_LD = torch.zeros((layers, hidden), dtype=torch.float64)
    if negatives:
        count = sum(len(sequence.ids) for sequence in negatives)

        def consume_negative(layer: int, x_TD: torch.Tensor, _places_T: torch.Tensor) -> None:
            negative_LD[layer] += x_TD.sum(0, dtype=torch.float64).cpu() / count

        run_with_inputs(view, negatives, consume_negative, lambda _: None)
    return DomainStatistics(total, sum_LD, outer_LDD, negative_LD, sample_LND, dict(source))


def run_with_inputs(
    view: DenseView,
    sequences: Sequence[TokenSequence],
    consume: Callable[[int, torch.Tensor, torch.Tensor], None],
    advance: Callable[[int], None],
) -> None:
    """Forward passes over all sequences; `consume(layer, x_TD, places_T)` gets the real tokens of each batch.

    `places_T` counts tokens in the order of `sequences`, whatever the batches.
    """
    starts = torch.tensor([0, *(len(sequence.ids) for sequence in sequences)]).cumsum(0)
    mask: torch.Tensor | None = None
    whole = False  # no pads in the batch: nothing to pick out
    places_T: torch.Tensor | None = None

    def hook(layer: int) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def read(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            assert mask is not None and places_T is not None
            x_BSD = args[0].detach()
            consume(layer, x_BSD.flatten(0, 1) if whole else x_BSD[mask], places_T)

        return read

    handles = [module.register_forward_pre_hook(hook(layer)) for layer, module in enumerate(view.ffn_modules())]
    device = view.model.device
    try:
        with torch.inference_mode():
            for batch in make_batches(sequences):
                mask, whole = batch.mask.to(device), bool(batch.mask.all())
                within = torch.arange(batch.mask.shape[1])
                places_T = (starts[torch.tensor(batch.rows)][:, None] + within)[batch.mask]
                # Only the decoder runs: the head's logits are not needed, and cost a third of a small model's pass.
                view.model.model(input_ids=batch.input_ids.to(device), attention_mask=mask.long(), use_cache=False)
                advance(int(batch.mask.sum()))
    finally:
        for handle in handles:
            handle.remove()
