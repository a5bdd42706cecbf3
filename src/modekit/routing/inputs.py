"""What routers really read: the input of every router, averaged as its gate takes it, pads excluded, under each domain's own
expert; and what a fit keeps of it: a sum and a sample. One file per domain, so that a domain can be added or removed later
without the others' text, an interrupted fit goes on with the next one, and a second fit with the same text reads none of it.

Of a pair a router reads one side: in the encoder the source, all of which it sees at once, and in the decoder the target.

Shape legend: B batch, S sequence (in a decoder the target), D width of what a gate takes (its parts side by side), T real
tokens of a batch, N kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, Field
from torch import nn
from transformers import PreTrainedTokenizerBase

from modekit.architecture.modekit_router import causal_average
from modekit.files.typed import Count, as_kind
from modekit.loaded.load import in_float64, load_tokenizer
from modekit.loaded.mixture import ExpertView
from modekit.loaded.passes import check_text, has_encoder, run_backbone, tokens_per_batch
from modekit.loaded.shapes import expert_view
from modekit.planning.mixture_config import averages_of, prefix_of
from modekit.recipes.recipe import Expert
from modekit.routing.examples import chats_of
from modekit.routing.fit import Fitting
from modekit.routing.kept import FitText, Get, Header, Provenance, checked, kept_or_text, load_kept, save_kept
from modekit.run import ProgressCount
from modekit.text.sequences import TokenSequence, encode, make_batches
from modekit.text.splits import digest_of

_LARGEST = torch.finfo(torch.float16).max  # where a family's FFN reads an unnormalised stream, outliers may be larger


def to_float16(x: torch.Tensor) -> torch.Tensor:
    """Activations as they are kept: float16 on the CPU, outliers at its largest number."""
    return x.clamp(-_LARGEST, _LARGEST).to("cpu", torch.float16)


@dataclass(frozen=True)
class SlotStatistics:
    """Of one router, x = what its gate took while the domain's own expert was active.

    Attributes:
        sum_D: sum of x, float64.
        negative_D: mean x of the negative prompts, float64; zero when there are none.
        sample_ND: evenly spaced x, float16.
        count: how many x were seen; pads never count.
    """

    sum_D: torch.Tensor
    negative_D: torch.Tensor
    sample_ND: torch.Tensor
    count: int

    @property
    def mean_D(self) -> torch.Tensor:
        """Mean of x, float64."""
        return self.sum_D / self.count


@dataclass(frozen=True)
class DomainStatistics:
    """Of one domain, for every router.

    Attributes:
        tokens: how many there were, of pairs on both sides.
        slots: statistics in the order of the checkpoint's routers.
        source: what they were made from: settings and a digest of the text.
    """

    tokens: int
    slots: tuple[SlotStatistics, ...]
    source: Provenance

    def save(self, path: Path) -> None:
        """Write atomically."""
        tensors: dict[str, torch.Tensor] = {}
        for number, slot in enumerate(self.slots):
            named = {"sum": slot.sum_D, "negative": slot.negative_D, "sample": slot.sample_ND}
            tensors |= {f"{number}.{name}": tensor for name, tensor in named.items()}
        about = {"tokens": self.tokens, "slots": len(self.slots), "source": self.source}
        counts = [slot.count for slot in self.slots]
        save_kept(path, tensors, {**about, "counts": counts} if any(count != self.tokens for count in counts) else about)


def load_statistics(path: Path) -> DomainStatistics | None:
    """Read a domain's statistics; None when there are none, or only tokens. Raises CheckpointError when damaged."""
    return load_kept(path, _statistics)


def _statistics(get: Get, about: Header) -> DomainStatistics | None:
    if "slots" not in about:  # of a router that reads tokens
        return None
    said, slots = as_kind(about, _Header), []
    for number, count in zip(range(said.slots), said.counts or [said.tokens] * said.slots, strict=True):
        sum_D = checked(get(f"{number}.sum"), (None,))
        negative_D = checked(get(f"{number}.negative"), (len(sum_D),))
        slots.append(SlotStatistics(sum_D, negative_D, checked(get(f"{number}.sample"), (None, len(sum_D))), count))
    return DomainStatistics(said.tokens, tuple(slots), said.source)


class _Header(BaseModel):
    tokens: Annotated[Count, Field(ge=1)]
    slots: Annotated[Count, Field(le=2**20)]
    source: Provenance
    counts: list[Annotated[Count, Field(ge=1)]] = []


class _Sums:
    """The sum and kept tokens of one router while a text runs through."""

    def __init__(self, width: int, kept_places: torch.Tensor) -> None:
        self._places = kept_places
        self.sum_D = torch.zeros(width, dtype=torch.float64)
        self.sample_ND = torch.zeros((len(kept_places), width), dtype=torch.float16)

    def add(self, x_TD: torch.Tensor, places_T: torch.Tensor) -> None:
        """Take the tokens of a batch."""
        self.sum_D += in_float64(x_TD).sum(0).cpu()
        if not len(self._places):
            return
        slots = torch.searchsorted(self._places, places_T)
        found = (slots < len(self._places)) & (self._places[slots.clamp(max=len(self._places) - 1)] == places_T)
        self.sample_ND[slots[found]] = to_float16(x_TD[found.to(x_TD.device)])


@dataclass(frozen=True)
class GateInput:
    """What a gate takes of x: causal averages side by side, by their decays (None: x itself), and the prefix after which they
    stay (architecture/modekit_router.py).
    """

    decays: Sequence[float | None] = (None,)
    prefix: int | None = None

    def of(self, x_BSD: torch.Tensor, mask_BS: torch.Tensor, *, at_once: bool) -> torch.Tensor:
        """(B, S, J D). A gate is linear, so that averaging what it reads, as here, is averaging what it says, as the router
        does. `at_once`: as in an encoder, which sees a source as a whole: every token has the averages that the last one has.
        """
        parts = []
        for decay in self.decays:
            part = x_BSD
            if decay is not None:
                part, _ = causal_average(x_BSD, mask_BS.to(x_BSD), decay, None, prefix=self.prefix)
                part = part[:, -1:].expand_as(x_BSD) if at_once else part  # pads behind a text change nothing
            parts.append(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def capture_domain(
    view: ExpertView,
    sequences: Sequence[TokenSequence],
    negatives: Sequence[TokenSequence],
    *,
    read: GateInput,
    keep_tokens: int,
    advance: Callable[[int], None] = lambda _: None,
) -> DomainStatistics:
    """Run a domain's text through its own expert and sum what every router's gate would take.

    `advance` is called with 0 before the first batch, and with the number of tokens after each. Which tokens are kept depends
    on their place in `sequences` alone, so neither padding nor the order of batches changes the result beyond rounding.
    """
    check_text(view.model, [*sequences, *negatives])
    found, counts = _summed(view, sequences, read, keep_tokens, advance)
    against, against_counts = _summed(view, negatives, read, 0) if negatives else ({}, [0, 0])
    slots = []
    for slot, side in enumerate(view.in_decoder()):
        sums = found[slot]
        negative_D = against[slot].sum_D / against_counts[side] if negatives else torch.zeros_like(sums.sum_D)
        slots.append(SlotStatistics(sums.sum_D, negative_D, sums.sample_ND, counts[side]))
    return DomainStatistics(sum(counts), tuple(slots), {})


def _summed(
    view: ExpertView,
    sequences: Sequence[TokenSequence],
    read: GateInput,
    keep_tokens: int,
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[dict[int, _Sums], list[int]]:
    """Of every router, and how many tokens the sources, or plain texts, have, and the targets."""
    sides, counts = view.in_decoder(), [sum(sizes) for sizes in _sizes(sequences)]
    kept = [_evenly(count, keep_tokens) for count in counts]
    found: dict[int, _Sums] = {}

    def consume(slot: int, x_TD: torch.Tensor, places_T: torch.Tensor) -> None:
        if slot not in found:
            found[slot] = _Sums(x_TD.shape[1], kept[sides[slot]])
        found[slot].add(x_TD, places_T)

    run_with_inputs(view, sequences, read, consume, advance)
    return found, counts


def _evenly(total: int, most: int) -> torch.Tensor:
    """Places of the tokens that are kept of so many."""
    kept = min(most, total)
    return torch.linspace(0, total - 1, kept, dtype=torch.float64).round().long() if kept else torch.empty(0).long()


def run_with_inputs(
    view: ExpertView,
    sequences: Sequence[TokenSequence],
    read: GateInput,
    consume: Callable[[int, torch.Tensor, torch.Tensor], None],
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Forward passes over all sequences. `consume` gets the slot, what its gate takes of each batch's real tokens (T, D), and
    their places (T,) in the order of the sequences, of the sources' tokens alone, or the targets'.
    """
    starts = [torch.tensor([0, *sizes]).cumsum(0) for sizes in _sizes(sequences)]
    sides, encodes = view.in_decoder(), has_encoder(view.model)
    real: list[tuple[torch.Tensor, torch.Tensor]] = []  # mask (B, S) and places (T,) of each side of a batch

    def taken(slot: int, _module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x_BSD, (mask_BS, places_T) = args[0].detach().float(), real[sides[slot]]
        mask_BS = mask_BS.to(x_BSD.device)
        consume(slot, read.of(x_BSD, mask_BS, at_once=encodes and not sides[slot])[mask_BS], places_T)

    with ExitStack() as hooks, torch.inference_mode():
        for slot, module in enumerate(view.router_inputs()):
            hooks.enter_context(module.register_forward_pre_hook(partial(taken, slot)))
        advance(0)
        for batch in make_batches(sequences, tokens=tokens_per_batch(view.model)):
            rows, masks = torch.tensor(batch.rows), (batch.mask, batch.target_mask)
            places = [each[rows][:, None] + torch.arange(mask.shape[1]) for mask, each in zip(masks, starts, strict=True)]
            real[:] = [(mask, each[mask]) for mask, each in zip(masks, places, strict=True)]
            run_backbone(view.model, batch)
            advance(batch.tokens)


def _sizes(sequences: Sequence[TokenSequence]) -> tuple[list[int], list[int]]:
    """Tokens of every source, or plain text, and of every target."""
    return [len(sequence.ids) for sequence in sequences], [len(sequence.target) for sequence in sequences]


def read_domains(fitting: Fitting) -> list[DomainStatistics]:
    """Statistics of every expert's domain, kept or read now. Raises TextError.

    The model is loaded when the first domain has to be read, and not at all when none has.
    """
    settings, run = fitting.settings, fitting.run
    tokenizer = load_tokenizer(fitting.checkpoint.folder, run=run)
    # All text is looked at before any is read through the model: what is wrong with the last shows at once.
    looked_at = []
    for place, expert in enumerate(fitting.recipe.experts):
        run.begin(f"tokenise {expert.name}")
        kept, how = load_statistics(fitting.statistics_file(expert.name)), _how(fitting, tokenizer, expert)
        widths = [slot.shape[1] for slot in fitting.checkpoint.slots]
        kept = kept if kept is not None and [len(slot.sum_D) for slot in kept.slots] == widths else None
        looked_at.append(kept_or_text(fitting, place, kept, how, tokenizer, settings.tokens_per_domain))
    total = sum(each.size for text in looked_at if isinstance(text, FitText) for each in text.sequences)
    found, view, count = list[DomainStatistics](), None, ProgressCount(run, total)
    for place, (expert, text) in enumerate(zip(fitting.recipe.experts, looked_at, strict=True)):
        if isinstance(text, DomainStatistics):
            found.append(text)
            continue
        if view is None:
            dtype = torch.float32 if settings.compute_dtype == "float32" else torch.bfloat16
            view = expert_view(fitting.checkpoint, dtype=dtype, run=run)
        view.use_expert(place)
        length = settings.sequence_length
        negatives = [
            each
            for prompt in expert.negative_prompts or []
            for each in encode(tokenizer, [prompt], max_tokens=length, sequence_length=length)
        ]
        statistics = capture_domain(
            view,
            text.sequences,
            negatives,
            read=GateInput(averages_of(settings), prefix_of(settings)),
            keep_tokens=settings.keep_tokens,
            advance=partial(count.advance, f"read {expert.name}"),
        )
        run.begin(f"keep what was read of {expert.name}")
        found.append(replace(statistics, source=text.source))
        found[-1].save(fitting.statistics_file(expert.name))
    return found


def _how(fitting: Fitting, tokenizer: PreTrainedTokenizerBase, expert: Expert) -> dict[str, object]:
    """What but the text decides a domain's statistics."""
    checkpoint, settings = fitting.checkpoint, fitting.settings
    how: dict[str, object] = {
        "negatives": [digest_of(prompt) for prompt in expert.negative_prompts or []],
        **settings.model_dump(mode="json", include={"sequence_length", "tokens_per_domain", "keep_tokens", "compute_dtype"}),
        "averages": [{"decay": decay} for decay in averages_of(settings)],
        "prefix": prefix_of(settings),
        "routers": [[slot.name, slot.width] for slot in checkpoint.slots],
        **chats_of(tokenizer, expert, settings),
    }
    if checkpoint.record.trained:  # what routers read is no longer what the build made
        how["trained"] = sorted(checkpoint.record.trained.values())
    return how
