"""How far an expert lies from the base, and from the experts that are there: one pass over the files, in blocks.

    drift     |D| / |base|        cosine    <D, D_f> / |D| |D_f|        distance    |D - D_f| / max(|D|, |D_f|)

D is the difference from the base (Frobenius). Shape legend: E experts, N elements of a block.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.sources import why_not
from modekit.errors import SourceError
from modekit.planning.changes import touched
from modekit.run import QUIET, Run
from modekit.sources.contents import OpenFiles
from modekit.sources.names import split_layer
from modekit.sources.open import open_recipe_sources
from modekit.sources.source import ModelSource
from modekit.weights.flat import FlatArray, holds_only_finite
from modekit.weights.made import as_in
from modekit.weights.numeric import BLOCK, to_float32
from modekit.weights.reading import WeightReader

_Double = npt.NDArray[np.float64]
_STEP = BLOCK // 8  # float64 rows of every expert side by side stay as small as one block of a copy


def similarity(checkpoint: Checkpoint, run: Run = QUIET) -> tuple[list[list[float]], list[str]]:
    """Cosine of what each pair of experts changed of the base in its layers (E, E), and notes; memory does not grow with the
    models. Two that changed nothing are alike (1); one that did and one that did not have 0. Empty where a model is gone, or
    is another one now.

    Raises SourceError for weights that are not finite.
    """
    names = checkpoint.names
    lacking = {name: why_not(checkpoint, place, run=run) for place, name in enumerate(names)}
    lacking = {"base": why_not(checkpoint, None, run=run)} | lacking
    reasons = [f"{name} ({reason})" for name, reason in lacking.items() if reason]
    if reasons:
        return [], [f"experts were not compared, for want of a model: {reasons[0]}"]
    trusted = Run(trust_remote_code=True)  # no code is run to open models
    base, *experts = open_recipe_sources(checkpoint.record.pinned_recipe, checkpoint.recipe_root, run=trusted)
    compared = [name for name in checkpoint.shape.family.own_names(base) if split_layer(name)[0] is not None]
    products = compare(base, experts, compared, run).products
    lengths = np.sqrt(np.diag(products))
    scale = np.outer(lengths, lengths)
    alike = np.clip(np.divide(products, scale, out=np.zeros_like(scale), where=scale > 0), -1.0, 1.0)
    alike[np.outer(lengths == 0, lengths == 0)] = 1.0
    np.fill_diagonal(alike, 1.0)
    same = [name for at, name in enumerate(names) if not products[at, at] and experts[at] is not base]
    return alike.tolist(), [f"{', '.join(same)} changed nothing of the base model's layers"] if same else []


@dataclass(frozen=True)
class Likeness:
    """Of the first expert: squared length of the base's tensors, and the products <D_e, D_f> (E, E) of all experts."""

    base: float
    products: _Double

    @property
    def drift(self) -> float:
        """|D| / |base|."""
        return math.sqrt(self.products[0, 0] / self.base)

    def to(self, other: int) -> tuple[float, float] | None:
        """Cosine and distance to another expert; None where either equals the base."""
        own, its, both = self.products[0, 0], self.products[other, other], self.products[0, other]
        if not own or not its:
            return None
        cosine = float(np.clip(both / math.sqrt(own * its), -1, 1))
        return cosine, math.sqrt(max(own + its - 2 * both, 0.0) / max(own, its))


def compare(base: ModelSource, experts: Sequence[ModelSource], names: Collection[str], run: Run) -> Likeness:
    """Of these tensors together. Raises SourceError where one holds NaN or Inf."""
    square, products = 0.0, np.zeros((len(experts), len(experts)))
    for each in compare_each(base, experts, names, run):
        square, products = square + each.base, products + each.products
    return Likeness(square, products)


def compare_each(base: ModelSource, experts: Sequence[ModelSource], names: Collection[str], run: Run) -> Iterator[Likeness]:
    """Of every one of these tensors, which are read once. Raises SourceError where one holds NaN or Inf."""
    sources = (base, *experts)
    with OpenFiles() as opened:
        read = WeightReader(opened, sources)
        for name in run.over("compare", names, len(names)):
            ref = base.tensor(name)
            changed = [at for at, source in enumerate(sources) if at and source is not base and touched(source, name)]
            made = {at: as_in(sources[at], ref) for at in (0, *changed)}
            for at, each in made.items():
                for part in each.refs:
                    if not holds_only_finite(opened, part):
                        raise _damaged(sources[at], part.name)
            square, product = _sums(made[0].numbers(read), [made[at].numbers(read) for at in changed])
            for at, length in zip(changed, np.diagonal(product), strict=True):
                if not np.isfinite(length):  # DoRA of a row of zeros
                    raise _damaged(sources[at], name)
            products, rows = np.zeros((len(experts), len(experts))), np.array(changed, dtype=int) - 1
            products[np.ix_(rows, rows)] = product
            yield Likeness(square, products)


def _damaged(source: ModelSource, name: str) -> SourceError:
    return SourceError(
        "the weights hold NaN or Inf",
        where=f"{source.where}: {name}",
        remedy="the model is damaged: save or download it again",
    )


def _sums(base: FlatArray, experts: Sequence[FlatArray]) -> tuple[float, _Double]:
    """|base|^2 and <D_e, D_f> (E, E) of one tensor."""
    square, product = 0.0, np.zeros((len(experts), len(experts)))
    for start in range(0, len(base), _STEP):
        part = slice(start, start + _STEP)
        origin = to_float32(base[part]).astype(np.float64)
        square += float(origin @ origin)
        if experts:
            delta_EN = np.stack([to_float32(expert[part]) - origin for expert in experts])
            product += delta_EN @ delta_EN.T
    return square, product
