"""Which text a training reads in which step: domains mixed by share, short sets begun anew, documents packed into rows.

A step's sequences are drawn before they are dealt out to processes and parts, so that two processes read in a step what
one would. Everything is drawn from the seed in advance: a training that goes on after a kill reads what it would have read.

Shape legend: B rows, S sequence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from modekit.text.sequences import NO_LABEL, TokenSequence
from modekit.training.losses import GENERIC
from modekit.training.settings import RandomiseTo, TrainSettings


@dataclass(frozen=True)
class DomainSequences:
    """Text of one domain in sequences; `expert` is the index of its own expert, GENERIC for text of no domain.

    `tags`: token ids of the tags of all experts, where text is read with them: then sequences have their own domain's.
    """

    name: str
    expert: int
    sequences: Sequence[TokenSequence]
    tags: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens, each once."""
        return sum(sequence.size for sequence in self.sequences)

    @cached_property
    def starts(self) -> torch.Tensor:
        """Where each sequence begins among the tokens of all, and where the last one ends; of pairs, among those of sources."""
        return torch.tensor([0, *(len(sequence.ids) for sequence in self.sequences)]).cumsum(0)

    def read_as(self, number: int, label: int) -> TokenSequence:
        """One sequence as it is read under a label: with that expert's tag in the place of its own, GENERIC without one."""
        sequence = self.sequences[number]
        if not self.tags or label == self.expert or sequence.tag is None:
            return sequence
        return sequence.with_tag(None if label == GENERIC else self.tags[label])


@dataclass(frozen=True)
class Draw:
    """One sequence of a step: where it stands, and the label it is given (randomised or not)."""

    corpus: int
    sequence: int
    label: int


Row = list[Draw]
"""Sequences side by side in one row of a batch."""


@dataclass(frozen=True)
class BatchPart:
    """Rows that go through the model together, how many predicted tokens the whole step has, and the label of its first
    sequence: of all of them, in a joint training.
    """

    rows: list[Row]
    step_targets: int
    expert: int


def shares(corpora: Sequence[DomainSequences], settings: TrainSettings) -> list[float]:
    """Share of the tokens that each corpus gets: they sum to 1."""
    exponent = {"equal": 0.0, "proportional": 1.0, "temperature": 1.0 / settings.mix_temperature}[settings.mix]
    sizes = [corpus.tokens**exponent if corpus.expert != GENERIC else 0.0 for corpus in corpora]
    generic = sum(corpus.expert == GENERIC for corpus in corpora)
    rest = 1.0 - (settings.generic_share if generic else 0.0)
    total = sum(sizes)
    return [
        settings.generic_share / generic if corpus.expert == GENERIC else rest * size / total
        for corpus, size in zip(corpora, sizes, strict=True)
    ]


def steps_of_one_pass(corpora: Sequence[DomainSequences], settings: TrainSettings) -> int:
    """Steps after which as many tokens were read as the domains have."""
    return max(1, round(sum(corpus.tokens for corpus in corpora) / settings.batch_tokens))


def plan_parts(
    corpora: Sequence[DomainSequences], settings: TrainSettings, *, steps: int, experts: int, parts: int, pack: bool
) -> list[BatchPart]:
    """All parts of all steps, `parts` per step, in order."""
    planned: list[BatchPart] = []
    for draws in _draw_steps(corpora, settings, steps, experts):
        sequences = {draw: corpora[draw.corpus].sequences[draw.sequence] for draw in draws}
        targets = sum(sequences[draw].scored for draw in draws)
        lengths = [sequences[draw].size for draw in draws]
        rows = _packed(draws, lengths, settings.sequence_length) if pack else [[draw] for draw in draws]
        sizes = [sum(sequences[draw].size for draw in row) for row in rows]
        planned += [BatchPart(dealt, targets, draws[0].label) for dealt in _deal(rows, sizes, parts)]
    return planned


def _draw_steps(corpora: Sequence[DomainSequences], settings: TrainSettings, steps: int, experts: int) -> Iterator[list[Draw]]:
    """Sequences of each step: the corpus that lags its share most comes next; in a joint training it has the whole step, under
    one label.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    wanted = shares(corpora, settings)
    pending: list[list[int]] = [[] for _ in corpora]
    read = [0] * len(corpora)
    for _ in range(steps):
        draws: list[Draw] = []
        tokens = 0
        corpus = label = None
        while tokens < settings.batch_tokens:
            total = sum(read) + 1
            if corpus is None or not settings.is_joint:
                corpus = max(range(len(corpora)), key=lambda each: (wanted[each] - read[each] / total, -each))
            if not pending[corpus]:
                pending[corpus] = torch.randperm(len(corpora[corpus].sequences), generator=generator).tolist()
            sequence = pending[corpus].pop()
            size = corpora[corpus].sequences[sequence].size
            if draws and tokens + size > settings.batch_tokens * 1.1:  # the next step begins with it
                pending[corpus].append(sequence)
                break
            if label is None or not settings.is_joint:
                label = drawn_label(corpora[corpus].expert, settings.randomise, settings.randomise_to, experts, generator)
            draws.append(Draw(corpus, sequence, label))
            read[corpus] += size
            tokens += size
        yield draws


def drawn_label(expert: int, randomise: float, to: RandomiseTo, experts: int, generator: torch.Generator) -> int:
    """The domain's own expert; with probability `randomise` another, or none (GENERIC), as `to` says."""
    if randomise == 0 or expert == GENERIC:
        return expert
    chance, which = torch.rand(2, generator=generator).tolist()
    if chance >= randomise:
        return expert
    if to == "all":
        return int(which * experts)
    if to == "generic" or experts == 1 or (to == "half" and chance < randomise / 2):
        return GENERIC
    return (expert + 1 + int(which * (experts - 1))) % experts


def _packed(draws: Sequence[Draw], lengths: Sequence[int], size: int) -> list[Row]:
    """Rows of at most `size` tokens: longest first, each into the first row with room."""
    rows: list[Row] = []
    room: list[int] = []
    for number in sorted(range(len(draws)), key=lambda number: -lengths[number]):
        row = next((row for row, free in enumerate(room) if free >= lengths[number]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(size)
        rows[row].append(draws[number])
        room[row] -= lengths[number]
    return rows


def _deal(rows: list[Row], sizes: Sequence[int], parts: int) -> list[list[Row]]:
    """Deal rows out into parts that cost about the same, similar lengths together so that little is padding.

    A part without a row gets one of another's twice with no weight; see `Batches`.
    """
    order = sorted(range(len(rows)), key=lambda row: -sizes[row])
    total = sum(sizes)
    dealt: list[list[Row]] = [[] for _ in range(parts)]
    done = 0.0
    for row in order:
        dealt[min(parts - 1, int(done / total * parts))].append(rows[row])
        done += sizes[row]
    return dealt


def predicted_in(item: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Places (B, S - 1) from which a real token of the same document is predicted: no pads, no ends of documents, no tags."""
    found = item["real"][:, :-1] & item["real"][:, 1:] & (item["position_ids"][:, 1:] > 0)
    return found if item.get("silent") is None else found & ~item["silent"][:, 1:]


class Batches(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The parts as tensors.

    Each item: input_ids (B, S) int64; real (B, S) bool; position_ids (B, S) int64, from 0 for every sequence; labels (B, S)
    int64, the expert that the router is to take, GENERIC for none; corpus and position (B, S) int64, where each token stands in
    the corpora; targets, how many tokens the whole step predicts; expert, the label of the step's first sequence. Of pairs, one
    per row, all this is of the source, and target (B, T) int64 has what is to be written, -100 behind its end. Where tokens
    are not predicted (tags, and of conversations what no assistant says), silent (B, S) bool has them.
    """

    def __init__(self, corpora: Sequence[DomainSequences], parts: Sequence[BatchPart]) -> None:
        self._corpora = corpora
        self._parts = parts
        self._starts = [corpus.starts.tolist() for corpus in corpora]
        self._has_silent = any(sequence.silent for corpus in corpora for sequence in corpus.sequences)

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        part = self._parts[index]
        rows = part.rows or [[]]  # a process without a row still takes part in the step
        length = max(2, *(sum(len(self._read(draw)[0].ids) for draw in row) for row in rows))
        shape = (len(rows), length)
        item = {
            "input_ids": torch.zeros(shape, dtype=torch.int64),
            "real": torch.zeros(shape, dtype=torch.bool),
            "position_ids": torch.zeros(shape, dtype=torch.int64),
            "labels": torch.full(shape, GENERIC),
            "corpus": torch.zeros(shape, dtype=torch.int64),
            "position": torch.zeros(shape, dtype=torch.int64),
            "targets": torch.tensor(part.step_targets),
            "expert": torch.tensor(part.expert),
            **({"silent": torch.zeros(shape, dtype=torch.bool)} if self._has_silent else {}),
        }
        for number, row in enumerate(rows):
            start = 0
            for draw in row:
                sequence, places = self._read(draw)
                ids = sequence.ids
                here = slice(start, start + len(ids))
                item["input_ids"][number, here] = torch.tensor(ids)
                item["real"][number, here] = True
                item["position_ids"][number, here] = torch.arange(len(ids))
                item["labels"][number, here] = draw.label
                item["corpus"][number, here] = draw.corpus
                item["position"][number, here] = places
                if sequence.silent:
                    item["silent"][number, torch.tensor(list(sequence.silent)) + start] = True
                start += len(ids)
            item["position_ids"][number, start:] = torch.arange(length - start)  # pads are a sequence of their own
        return item | self._target(rows)

    def _target(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        if not any(sequence.target for corpus in self._corpora for sequence in corpus.sequences[:1]):
            return {}
        targets = [self._corpora[row[0].corpus].sequences[row[0].sequence].target if row else () for row in rows]
        made = torch.full((len(rows), max(1, *map(len, targets))), NO_LABEL)
        for number, target in enumerate(targets):
            made[number, : len(target)] = torch.tensor(target)
        return {"target": made}

    def describe(self, number: int) -> str:
        """Domains of a part for messages."""
        counts = Counter(self._corpora[draw.corpus].name for row in self._parts[number].rows for draw in row)
        return ", ".join(f"{count} of {name}" for name, count in counts.items())

    def _read(self, draw: Draw) -> tuple[TokenSequence, torch.Tensor]:
        """A sequence under its label, and where its tokens stand in the corpus, less the place of a tag taken out."""
        corpus, first = self._corpora[draw.corpus], self._starts[draw.corpus][draw.sequence]
        own, read = corpus.sequences[draw.sequence], corpus.read_as(draw.sequence, draw.label)
        places = torch.arange(first, first + len(own.ids))
        if own.tag is not None and read.tag is None:
            places = torch.cat([places[: own.tag], places[own.tag + 1 :]])
        return read, places
