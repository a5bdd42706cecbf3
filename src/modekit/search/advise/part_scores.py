"""The base in memory with parts of experts in it, scored on their text.

One model is in memory: the base, whose parameters are overwritten in memory from an expert's files, and then from its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from modekit.building.tensors import PieceReader
from modekit.evaluation.domains import Domain
from modekit.evaluation.loss import score_domain
from modekit.planning.pieces import piece_of
from modekit.recipes.mixture import BackboneMerge
from modekit.run import QUIET, Run
from modekit.search.advise.gains import BASE_INDEX, PARTS, BlockLosses, Gains
from modekit.search.advise.result import Group
from modekit.sources.contents import OpenFiles
from modekit.sources.model import ModelSource
from modekit.text.sequences import TokenSequence
from modekit.weights.merge import merge_blocks
from modekit.weights.numeric import blocks, to_float32

_BLOCKS = 8
_AVERAGE = BackboneMerge(method="average")


class PatchedBase:
    """The base in memory, of which groups of tensors can be an expert's for a while.

    `moved` names per expert (index in `sources` less one) the tensors that differ from the base's; others are not touched.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sources: Sequence[ModelSource],
        groups: Mapping[str, Group],
        moved: Sequence[frozenset[str]],
        opened: OpenFiles,
    ) -> None:
        self.model = model
        self._tensors: dict[str, torch.Tensor] = model.state_dict()  # shares its storage with the model
        self._sources, self._groups, self._moved = tuple(sources), groups, moved
        self._read = PieceReader(opened)

    @contextmanager
    def with_parts(self, experts: Sequence[int], groups: Collection[Group]) -> Iterator[None]:
        """While open, these groups are an expert's, or the average of several. Afterwards they are the base's, bit for bit."""
        moved = frozenset().union(*(self._moved[expert] for expert in experts))
        names = [name for name in moved if self._groups[name] in groups]
        try:
            for name in names:
                self._write(name, [expert + 1 for expert in experts])
            yield
        finally:
            for name in names:
                self._write(name, [0])

    def moved_groups(self, expert: int) -> frozenset[Group]:
        """Groups in which the expert differs from the base."""
        return frozenset(self._groups[name] for name in self._moved[expert])

    def _write(self, name: str, indices: Sequence[int]) -> None:
        """Overwrite a parameter with a tensor of one source, or with the average of several, in blocks."""
        ref = self._sources[0].tensor(name)
        pieces = [piece_of(self._sources, index, ref) for index in indices]
        arrays = [self._read.values(piece) for piece in pieces]
        flat = self._tensors[name].view(-1)
        if len(arrays) == 1:
            values: Iterable[npt.NDArray[np.float32]] = (to_float32(arrays[0][part]) for part in blocks(len(arrays[0])))
        else:
            values = (block.astype(np.float32) for block in merge_blocks(_AVERAGE, arrays[0], arrays, ref.shape))
        start = 0
        with torch.no_grad():
            for block in values:  # an average comes in smaller ones
                flat[start : start + len(block)] = torch.from_numpy(block).to(flat)
                start += len(block)


def measure(
    patched: PatchedBase, texts: Mapping[int, Sequence[TokenSequence]], experts: Sequence[int], *, run: Run = QUIET
) -> Gains:
    """Score the base and every expert on every domain, and the parts of every expert on its own text.

    `texts` by the expert whose domain it is; an expert that equals the base is not run again.
    """
    own = [expert for expert in experts if expert in texts]
    # A group that did not move changes nothing: what is left of a part is looked up when it is the base, the whole or known.
    sets = {e: {name: groups & patched.moved_groups(e) for name, groups in PARTS.items()} for e in own}
    runs = [e for e in own for part in {*sets[e].values()} if part and part != patched.moved_groups(e)]
    moving = [expert for expert in experts if patched.moved_groups(expert)]
    scorer = _Scorer(patched.model, texts, len(texts) * (1 + len(moving)) + len(runs), run)
    base = {domain: scorer.score("base", domain) for domain in texts}
    whole: dict[int, dict[int, BlockLosses]] = {BASE_INDEX: base}
    parts: dict[int, dict[str, BlockLosses]] = {}
    for expert in experts:
        every = patched.moved_groups(expert)
        if not every:
            whole[expert] = base
        else:
            with patched.with_parts([expert], every):
                whole[expert] = {domain: scorer.score("expert", domain) for domain in texts}
        if expert not in texts:
            continue
        known: dict[frozenset[Group], BlockLosses] = {frozenset(): base[expert], every: whole[expert][expert]}
        for part in sets[expert].values():
            if part not in known:
                with patched.with_parts([expert], part):
                    known[part] = scorer.score("part", expert)
        parts[expert] = {name: known[part] for name, part in sets[expert].items()}
    return Gains(whole, parts)


def on_average(
    patched: PatchedBase, texts: Mapping[int, Sequence[TokenSequence]], experts: Sequence[int], *, run: Run = QUIET
) -> dict[int, BlockLosses]:
    """Loss of each expert's FFN on a backbone that is the average of all: what FFN experts could reach there."""
    own = [expert for expert in experts if expert in texts]
    scorer = _Scorer(patched.model, texts, len(own), run)
    losses = {}
    with patched.with_parts(experts, PARTS["all"] - PARTS["ffn"]):
        for expert in own:
            with patched.with_parts([expert], PARTS["ffn"]):
                losses[expert] = scorer.score("average", expert)
    return losses


class _Scorer:
    """Scores a model on the blocks of a domain's text and reports progress over `passes`."""

    def __init__(self, model: PreTrainedModel, texts: Mapping[int, Sequence[TokenSequence]], passes: int, run: Run) -> None:
        self._model, self._passes, self._run = model, passes, run
        self._blocks = {index: [Domain("", None, part) for part in _cut(text)] for index, text in texts.items()}
        self._done = 0

    def score(self, name: str, domain: int) -> BlockLosses:
        """Losses of the model as it is now."""
        sums, tokens = [], []
        for block in self._blocks[domain]:
            sums.append(score_domain(self._model, block, lambda _: None).loss * block.scored_tokens)
            tokens.append(float(block.scored_tokens))
        self._done += 1
        self._run.progress(f"score {name}", self._done, self._passes)
        return BlockLosses(np.array(sums), np.array(tokens))


def _cut(sequences: Sequence[TokenSequence]) -> list[Sequence[TokenSequence]]:
    """Up to _BLOCKS runs of sequences with about as many tokens each, so that a document is mostly in one of them."""
    total = sum(sequence.size for sequence in sequences)
    parts: list[list[TokenSequence]] = [[]]
    taken = 0
    for sequence in sequences:
        if parts[-1] and taken >= total * len(parts) / _BLOCKS:
            parts.append([])
        parts[-1].append(sequence)
        taken += sequence.size
    return [part for part in parts if part]
