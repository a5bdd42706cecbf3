"""What routers really read: the input of every router, averaged as its gate takes it, pads excluded, under each domain's own
expert; and what a fit keeps of it: a sum and a sample. One file per domain, so that a domain can be added or removed later
without the others' text, an interrupted fit goes on with the next one, and a second fit with the same text reads none of it.

Of a pair a router reads one side: in the encoder the source, all of which it sees at once, and in the decoder the target.

Shape legend: B batch, S sequence (in a decoder the target), D width of what a gate takes (its parts side by side), T real
tokens of a batch, N kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, Field
from torch import nn

from modekit.architecture.modekit_router import causal_average
from modekit.architecture.modekit_scores import segment_means
from modekit.files.typed import Count, as_kind
from modekit.loaded.load import load_tokenizer
from modekit.loaded.mixture import ExpertView
from modekit.loaded.passes import check_text, has_encoder, run_backbone, tokens_per_batch
from modekit.loaded.shapes import expert_view
from modekit.processes import ALONE, Processes, processes
from modekit.recipes.recipe import Expert
from modekit.routing.examples import chats_of, examples_of
from modekit.routing.fit import Fitting
from modekit.routing.kept import Get, Header, Provenance, checked, documents_to_read, load_kept, save_kept
from modekit.text.sequences import TokenSequence, encode, make_batches
from modekit.text.splits import digest_of, text_record

_LARGEST = torch.finfo(torch.float16).max  # where a family's FFN reads an unnormalised stream, outliers may be larger


def to_float16(x: torch.Tensor) -> torch.Tensor:
    """Activations as they are kept: float16 on the CPU, outliers at its largest number."""
    return x.clamp(-_LARGEST, _LARGEST).to("cpu", torch.float16)


# What is kept.


@dataclass(frozen=True)
class SlotStatistics:
    """Of one router, x = what its gate took while the domain's own expert was active.

    Attributes:
        sum_D: sum of x, float64.
        negative_D: mean x of the negative prompts, float64; zero when there are none.
        sample_ND: evenly spaced x, float16.
    """

    sum_D: torch.Tensor
    negative_D: torch.Tensor
    sample_ND: torch.Tensor


@dataclass(frozen=True)
class DomainStatistics:
    """Of one domain, for every router.

    Attributes:
        tokens: how many x were seen, of pairs on both sides; pads never count.
        slots: statistics in the order of the checkpoint's routers.
        source: what they were made from: settings and a digest of the text.
        counts: of pairs, how many x each router saw, which reads one side; empty where all saw all.
    """

    tokens: int
    slots: tuple[SlotStatistics, ...]
    source: Provenance
    counts: tuple[int, ...] = ()

    def is_of(self, widths: Sequence[int]) -> bool:
        """Whether they are of gates that take so much, one after the other."""
        return [len(slot.sum_D) for slot in self.slots] == list(widths)

    def mean_D(self, slot: int) -> torch.Tensor:
        """Mean of x, float64."""
        return self.slots[slot].sum_D / self.count(slot)

    def count(self, slot: int) -> int:
        """How many x a router saw."""
        return self.counts[slot] if self.counts else self.tokens

    def save(self, path: Path) -> None:
        """Write atomically."""
        tensors: dict[str, torch.Tensor] = {}
        for number, slot in enumerate(self.slots):
            named = {"sum": slot.sum_D, "negative": slot.negative_D, "sample": slot.sample_ND}
            tensors |= {f"{number}.{name}": tensor for name, tensor in named.items()}
        counts = {"counts": self.counts} if self.counts else {}
        save_kept(path, tensors, {"tokens": self.tokens, "slots": len(self.slots), "source": self.source, **counts})


def load_statistics(path: Path) -> DomainStatistics | None:
    """Read a domain's statistics; None when there are none, or only tokens. Raises CheckpointError when damaged."""
    return load_kept(path, _statistics)


def _statistics(get: Get, about: Header) -> DomainStatistics | None:
    if "slots" not in about:  # of a router that reads tokens
        return None
    said = as_kind(about, _Header)
    if said.counts and len(said.counts) != said.slots:
        raise ValueError("counts of other routers")
    slots = []
    for number in range(said.slots):
        sum_D = checked(get(f"{number}.sum"), (None,))
        negative_D = checked(get(f"{number}.negative"), (len(sum_D),))
        slots.append(SlotStatistics(sum_D, negative_D, checked(get(f"{number}.sample"), (None, len(sum_D)))))
    return DomainStatistics(said.tokens, tuple(slots), said.source, said.counts)


class _Header(BaseModel):
    tokens: Annotated[Count, Field(ge=1)]
    slots: Count
    source: Provenance
    counts: tuple[Annotated[Count, Field(ge=1)], ...] = ()


# Reading a domain under its own expert.


class _Sums:
    """The sum and kept tokens of one router while a text runs through."""

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
    """What a gate takes of x: causal averages side by side, as `modekit.routing` of a config says them, and the prefix after
    which they stay (architecture/modekit_router.py).
    """

    averages: Sequence[Mapping[str, float | None]]
    prefix: int | None = None

    def of(self, x_BSD: torch.Tensor, mask_BS: torch.Tensor, *, at_once: bool) -> torch.Tensor:
        """(B, S, J D). A gate is linear, so that averaging what it reads, as here, is averaging what it says, as the router
        does. `at_once`: as in an encoder, which sees a source as a whole: every token has the averages that the last one has.
        """
        parts = []
        for average in self.averages:
            part, mask = x_BSD, mask_BS.to(x_BSD)
            if average["decay"] is not None:
                part, _ = causal_average(x_BSD, mask, average["decay"], None, prefix=self.prefix)
                part = part[:, -1:].expand_as(x_BSD) if at_once else part  # pads behind a text change nothing
            if average.get("segment"):  # in a text's first segment, where nothing is decided, what was read so far
                length = int(average["segment"] or 0)
                part = torch.where(mask.cumsum(1)[..., None] <= length, part, segment_means(x_BSD, mask, None, length)[0])
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
    on their place in `sequences` alone, so neither padding nor the order of batches changes the result beyond rounding. Under a
    launcher every process runs its share of the sequences, and what they found is added up.
    """
    shared, sides = processes(), view.in_decoder()
    check_text(view.model, [*sequences, *negatives])
    totals = [sum(sizes) for sizes in _sizes(sequences)]
    kept = [_evenly(total, keep_tokens) for total in totals]
    found: dict[int, _Sums] = {}

    def consume(slot: int, x_TD: torch.Tensor, places_T: torch.Tensor) -> None:
        if slot not in found:
            found[slot] = _Sums(x_TD.shape[1], kept[sides[slot]])
        found[slot].add(x_TD, places_T)

    run_with_inputs(view, sequences, read, consume, advance, shared)
    for slot, width in enumerate(shared.agree([len(found[slot].sum_D) for slot in sorted(found)])):
        found.setdefault(slot, _Sums(width, kept[sides[slot]])).add_up(shared)  # a process may have had no sequence
    negative = {slot: torch.zeros_like(each.sum_D) for slot, each in found.items()}
    counts = [sum(sizes) for sizes in _sizes(negatives)]

    def consume_negative(slot: int, x_TD: torch.Tensor, _places_T: torch.Tensor) -> None:
        negative[slot] += x_TD.sum(0, dtype=torch.float64).cpu() / counts[sides[slot]]

    if negatives:
        run_with_inputs(view, negatives, read, consume_negative)
    slots = tuple(SlotStatistics(found[slot].sum_D, negative[slot], found[slot].sample_ND) for slot in sorted(found))
    return DomainStatistics(
        sum(totals), slots, {}, tuple(totals[sides[slot]] for slot in sorted(found)) if totals[True] else ()
    )


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
    shared: Processes = ALONE,
) -> None:
    """Forward passes over all sequences. `consume` gets the slot, what its gate takes of each batch's real tokens (T, D), and
    their places (T,) in the order of the sequences, of the sources' tokens alone, or the targets'.
    """
    # By length, so that the shares cost the same.
    mine = sorted(range(len(sequences)), key=lambda row: (-sequences[row].size, row))[shared.rank :: shared.count]
    starts = [torch.tensor([0, *sizes]).cumsum(0) for sizes in _sizes(sequences)]
    sides, encodes = view.in_decoder(), has_encoder(view.model)
    real: tuple[_Real, ...] = ()

    def hook(slot: int) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def taken(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            own, x_BSD = real[sides[slot]], args[0].detach().float()
            mask_BS = own.mask_BS.to(x_BSD.device)
            x_BSD = read.of(x_BSD, mask_BS, at_once=encodes and not sides[slot])
            consume(slot, x_BSD.flatten(0, 1) if own.unpadded else x_BSD[mask_BS], own.places_T)

        return taken

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


# All domains of a fit.


@dataclass(frozen=True)
class _DomainToRead:
    """A domain whose statistics the main process has (`known`; `kept` here, if this process sees them), or the text they will
    be made from.
    """

    place: int
    name: str
    path: Path
    kept: DomainStatistics | None
    known: bool = True
    sequences: Sequence[TokenSequence] = ()
    negatives: Sequence[TokenSequence] = ()
    source: Provenance = field(default_factory=dict)


def read_domains(fitting: Fitting) -> list[DomainStatistics]:
    """Statistics of every expert's domain, kept or read now; of all of them in the main process only. Raises TextError.

    The model is loaded when the first domain has to be read, and not at all when none has.
    """
    reader = _Reader(fitting)
    # All text is looked at before any is read through the model: what is wrong with the last shows at once.
    looked_at = []
    for place, expert in enumerate(fitting.recipe.experts):
        fitting.run.begin(f"tokenise {expert.name}")
        looked_at.append(reader.look_at(place, expert))
    reader.total = sum(sequence.size for domain in looked_at for sequence in domain.sequences)
    domains = [domain.kept if domain.known else reader.read(domain) for domain in looked_at]
    return [domain for domain in domains if domain is not None]


class _Reader:
    """Reads the domains of one fit; `total` is how many tokens there are to read, `done` of them."""

    def __init__(self, fitting: Fitting) -> None:
        self._fitting, self._settings = fitting, fitting.settings
        self._tokenizer = load_tokenizer(fitting.checkpoint.folder, run=fitting.run)
        self._view: ExpertView | None = None
        self.done = self.total = 0

    def look_at(self, place: int, expert: Expert) -> _DomainToRead:
        """What has to be read for the expert at `place`: nothing when kept statistics fit text and settings.

        Text that is gone is not needed when its statistics fit the settings. Raises TextError.
        """
        path, how = self._fitting.statistics_file(expert.name), self._how(expert)
        kept = load_statistics(path)
        if kept is not None and not kept.is_of([slot.shape[1] for slot in self._fitting.checkpoint.slots]):
            kept = None
        documents = documents_to_read(self._fitting, place, None if kept is None else kept.source, how)
        if documents is None:
            return _DomainToRead(place, expert.name, path, kept, processes().agree(True))
        sequences = examples_of(self._tokenizer, documents, (place, expert), self._settings)
        source = {"text": text_record(documents, sum(sequence.size for sequence in sequences)), "how": how}
        domain = _DomainToRead(place, expert.name, path, kept)
        if processes().agree(kept is not None and kept.source == source):
            return domain
        length = self._settings.sequence_length
        negatives = [
            sequence
            for prompt in expert.negative_prompts or []
            for sequence in encode(self._tokenizer, [prompt], max_tokens=length, sequence_length=length)
        ]
        return replace(domain, kept=None, known=False, sequences=sequences, negatives=negatives, source=source)

    def read(self, domain: _DomainToRead) -> DomainStatistics | None:
        """Run the text through the backbone with the domain's own expert, and keep the statistics on disk; main has them."""

        def advance(count: int) -> None:
            self.done += count
            self._fitting.run.progress(f"read {domain.name}", self.done, self.total)

        if self._view is None:
            dtype = torch.float32 if self._settings.compute_dtype == "float32" else torch.bfloat16
            self._view = expert_view(self._fitting.checkpoint, dtype=dtype, run=self._fitting.run)
        self._view.use_expert(domain.place)
        read = GateInput(self._settings.averages, self._settings.prefix_tokens)
        keep = self._settings.keep_tokens
        found = capture_domain(self._view, domain.sequences, domain.negatives, read=read, keep_tokens=keep, advance=advance)
        if not processes().is_main:
            return None
        self._fitting.run.begin(f"keep what was read of {domain.name}")
        found = replace(found, source=domain.source)
        found.save(domain.path)
        return found

    def _how(self, expert: Expert) -> dict[str, object]:
        """What but the text decides a domain's statistics."""
        checkpoint, settings = self._fitting.checkpoint, self._settings
        how: dict[str, object] = {
            "negatives": [digest_of(prompt) for prompt in expert.negative_prompts or []],
            **settings.model_dump(
                mode="json", include={"sequence_length", "tokens_per_domain", "keep_tokens", "compute_dtype"}
            ),
            "averages": settings.averages,
            "prefix": settings.prefix_tokens,
            "routers": [[slot.name, slot.width] for slot in checkpoint.slots],
            **chats_of(self._tokenizer, expert, settings),
        }
        if checkpoint.record.trained:  # what routers read is no longer what the build made
            how["trained"] = sorted(checkpoint.record.trained.values())
        return how
