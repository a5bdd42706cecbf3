"""How far experts moved from the base, and from each other: one pass over all files, in blocks, in flat memory.

Tensors are in groups, by where the family keeps things, never by a word in a name:

    ffn           what lies in the FFN of its layer: in one module, or in those that the layer calls itself
    attention     what mixes tokens: every other module of a layer that has modules of its own, their norms included
    embeddings    the embedding, and with tied embeddings the head; of a model with an encoder learned positions, too
    head          the head, and what a model with an encoder adds to its logits
    norms         all that is left

Of every group of tensors the products of the experts' differences from the base are summed, which holds all of it:

    drift     |D_e| / |base|        share    |D_e|^2 in the group / |D_e|^2 in all        (Frobenius)
    cosine    <D_e, D_f> / |D_e| |D_f|        distance    |D_e - D_f| / max(|D_e|, |D_f|)

Shape legend: E experts, N elements of a block.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import numpy.typing as npt

from modekit.building.tensors import PieceReader
from modekit.planning.pieces import Piece, piece_of, touched
from modekit.planning.places import ATTENTION
from modekit.run import QUIET, Run
from modekit.search.advise.result import Group
from modekit.sources.compatibility import own_names
from modekit.sources.contents import OpenFiles
from modekit.sources.family import Family
from modekit.sources.model import ModelSource
from modekit.sources.names import HEAD, LOGITS_BIAS, is_looked_up, module_of, split_layer
from modekit.weights.numeric import BLOCK, to_float32
from modekit.weights.stored import FlatArray, holds_only_finite

GROUPS: tuple[Group, ...] = get_args(Group)
_Double = npt.NDArray[np.float64]
_STEP = BLOCK // 8  # float64 rows of every expert side by side stay as small as one block of a copy


def groups_of(base: ModelSource, family: Family) -> dict[str, Group]:
    """Name of every tensor of the base model -> its group. A tied head is no tensor of its own."""
    names = own_names(base, family)
    inside = {name: path for name in names for layer, path in [split_layer(name)] if layer is not None}
    blocks = {path.split(".")[0] for path in inside.values() if path.count(".") > 1}  # modules that have modules

    def group(name: str) -> Group:
        layer, path = split_layer(name)
        if layer is not None:
            stack = family.stack_of(layer)
            if _lies_in(path, stack.ffn_modules):
                return "ffn"
            # T5 numbers what holds the parts that mix tokens, and keeps norms beside them.
            mixing = {module_of(stack.parts[part]) for part in ATTENTION if part in stack.parts} if family.pair else blocks
            return "attention" if _lies_in(path, mixing) else "norms"
        if is_looked_up(module_of(name)):
            return "embeddings"
        return "head" if module_of(name) == HEAD or name == LOGITS_BIAS else "norms"

    return {name: group(name) for name in names}


def _lies_in(path: str, modules: Collection[str]) -> bool:
    return any(path.startswith(f"{module}.") for module in modules)


@dataclass(frozen=True)
class Drift:
    """Sums over the tensors of each group; experts by their number in `compare`.

    Attributes:
        base: squared length of the base's tensors.
        products: <D_e, D_f>, (E, E) float64.
        moved: per expert the names of the tensors that differ from the base's.
        damaged: per expert the names of tensors with NaN or Inf, whose differences are counted as zero.
        base_damaged: names of such tensors in the base.
    """

    base: Mapping[Group, float]
    products: Mapping[Group, _Double]
    moved: Sequence[frozenset[str]]
    damaged: Sequence[tuple[str, ...]]
    base_damaged: tuple[str, ...]

    @property
    def groups(self) -> list[Group]:
        """Groups that the base has, in their order."""
        return [group for group in GROUPS if group in self.base]

    def relative(self, expert: int, group: Group) -> float | None:
        """|D| / |base|; None where the base is zero and the difference is not."""
        square = float(self.products[group][expert, expert])
        return math.sqrt(square / self.base[group]) if self.base[group] else None if square else 0.0

    def share(self, expert: int, group: Group) -> float:
        """Of the expert's squared difference; 0 for an expert that equals the base."""
        every = self._all[expert, expert]
        return float(self.products[group][expert, expert] / every) if every else 0.0

    def total(self, expert: int) -> float:
        """|D| / |base| of all tensors together."""
        return math.sqrt(self._all[expert, expert] / sum(self.base.values()))

    def cosine(self, first: int, second: int) -> float | None:
        """Of two experts' differences from the base; None when one has none."""
        lengths = self._all[first, first] * self._all[second, second]
        return float(np.clip(self._all[first, second] / math.sqrt(lengths), -1, 1)) if lengths else None

    def distance(self, first: int, second: int) -> float:
        """Between two experts, relative to the one that moved further; 0 for equal ones."""
        longest = max(self._all[first, first], self._all[second, second])
        between = self._all[first, first] + self._all[second, second] - 2 * self._all[first, second]
        return math.sqrt(max(between, 0.0) / longest) if longest else 0.0

    @property
    def _all(self) -> _Double:
        every: _Double = np.sum([*self.products.values()], axis=0)
        return every


def compare(base: ModelSource, experts: Sequence[ModelSource], groups: Mapping[str, Group], *, run: Run = QUIET) -> Drift:
    """Read every tensor of the base and of the experts once. Raises SourceError when a file becomes shorter meanwhile."""
    sources = (base, *experts)
    tally = _Tally(len(experts))
    with OpenFiles() as opened:
        read = PieceReader(opened)
        for name, group in run.over("compare", groups.items(), len(groups)):
            tally.add(name, group, _pieces(sources, name), read)
    return tally.drift()


def _pieces(sources: tuple[ModelSource, ...], name: str) -> dict[int, Piece]:
    """A tensor of the base (0), and of the experts (from 1 on) that may have another one."""
    ref = sources[0].tensor(name)
    changed = [index for index in range(1, len(sources)) if sources[index] is not sources[0] and touched(sources[index], name)]
    return {index: piece_of(sources, index, ref) for index in (0, *changed)}


class _Tally:
    """Sums over the tensors so far."""

    def __init__(self, experts: int) -> None:
        self._experts = experts
        self._squares: dict[Group, float] = {}
        self._products: dict[Group, _Double] = {}
        self._moved: list[set[str]] = [set() for _ in range(experts)]
        self._damaged: list[list[str]] = [[] for _ in range(experts + 1)]  # the base's first

    def add(self, name: str, group: Group, pieces: Mapping[int, Piece], read: PieceReader) -> None:
        """Count one tensor. Where the base's is damaged, there is nothing to compare with."""
        broken = {
            index: [ref.name for ref in piece.refs if not holds_only_finite(read.opened, ref)]
            for index, piece in pieces.items()
        }
        for index, names in broken.items():
            if index == 0 or not broken[0]:
                self._damaged[index] += names
        products = self._products.setdefault(group, np.zeros((self._experts, self._experts)))
        if broken[0]:
            self._squares.setdefault(group, 0.0)
            return
        whole = [index for index in pieces if index > 0 and not broken[index]]
        square, product = _sums(read.values(pieces[0]), [read.values(pieces[index]) for index in whole])
        self._squares[group] = self._squares.get(group, 0.0) + square
        for index, length in zip(whole, np.diagonal(product), strict=True):
            if not np.isfinite(length):  # DoRA of a row of zeros
                self._damaged[index].append(name)
            elif length:
                self._moved[index - 1].add(name)
        rows = np.array(whole, dtype=int) - 1
        products[np.ix_(rows, rows)] += np.nan_to_num(product, nan=0.0)

    def drift(self) -> Drift:
        """What it came to."""
        base, *experts = (tuple(dict.fromkeys(names)) for names in self._damaged)
        return Drift(self._squares, self._products, [frozenset(names) for names in self._moved], experts, base)


def _sums(base: FlatArray, experts: Sequence[FlatArray]) -> tuple[float, _Double]:
    """|base|^2 and <D_e, D_f> (E, E) of one tensor."""
    square, product = 0.0, np.zeros((len(experts), len(experts)))
    for start in range(0, len(base), _STEP):
        part = slice(start, min(start + _STEP, len(base)))
        origin = to_float32(base[part]).astype(np.float64)
        square += float(origin @ origin)
        if experts:
            delta_EN = np.stack([to_float32(expert[part]) - origin for expert in experts])
            product += delta_EN @ delta_EN.T
    return square, product
