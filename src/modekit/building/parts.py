"""What is kept of every module of an expert with a budget: bytes go where they change the loss most.

To second order, and with inputs and gradients of a module taken as independent of each other and alike in all directions
(K-FAC, arXiv:1503.05671, with two numbers per module in place of two matrices), an error D of a weight costs

    1/2 E[x^2] E[g^2] |D|^2        x inputs of the module, g gradients of the loss by its outputs, mean squares of a number

which the expert's own model tells on the fit split of its text. Of a module that loses its whole difference that says too
little; there an error's share of the difference tells more. The geometric mean of both counts; without text that share. |D|^2
of a rank is what its singular values leave, of a few bits it is measured. From the smallest parts on, the module that gains
most per byte gets its next larger one.

Shape legend: O outputs, I inputs.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pkgutil import resolve_name

import numpy as np

from modekit.building.tensors import PieceReader, check_finite
from modekit.planning.budgets import BITS, Part
from modekit.planning.make import plan_of
from modekit.planning.pieces import Factor, piece_of
from modekit.planning.places import Places
from modekit.planning.plan import Plan
from modekit.run import QUIET, Run
from modekit.sources.contents import OpenFiles
from modekit.text.document import Document
from modekit.text.held_out import fit_documents
from modekit.weights.factor_size import SMALL
from modekit.weights.factorise import Array32, energies
from modekit.weights.few_bits import squared_error

_PHASE = "choose parts"
_ROWS = 512  # of a weight, on which errors of few bits are measured
_MOST_RANK = 64  # of a weight that is decomposed by iteration: beyond, a difference is no longer of low rank
_ROUNDING = 1e-10  # of a squared norm: less is that of float32
_SENSITIVITIES = "modekit.loaded.moments:sensitivities_on"
"""By its path, as it needs torch and a build without text does not."""
_Sensitivities = Callable[[Path, Path, Sequence[Document], Sequence[str], Run], dict[str, float]]
_Option = tuple[int, float, Part]
"""Bytes, error, and what is kept."""


def settled(plan: Plan, *, run: Run = QUIET) -> Plan:
    """The plan with parts for every expert whose recipe gives a budget alone; the plan itself where there is none.

    Raises SourceError for weights that are not finite, and TextError.
    """
    experts = list(plan.recipe.experts)
    missing = [place for place, said in enumerate(experts) if said.budget is not None and said.parts is None]
    if not missing:
        return plan
    places = Places(plan.recipe, plan.sources, plan.family)
    for expert in missing:
        parts = _parts(plan, places, expert, run.about(experts[expert].name))
        said = {module: str(part) for module, part in parts.items()}
        experts[expert] = experts[expert].model_copy(update={"parts": said})
    given = plan.sources if plan.vocabulary is None else plan.vocabulary.given  # plan_of gives them their rows itself
    return plan_of(plan.recipe.model_copy(update={"experts": experts}), plan.root, given, run=run)


def _parts(plan: Plan, places: Places, expert: int, run: Run) -> dict[str, Part]:
    budget = places.budget(expert)
    known = _from_text(plan, expert, list(budget.shapes), run)
    options: dict[str, list[_Option]] = {}
    with OpenFiles() as opened:
        read = PieceReader(opened)
        for place in places:
            if place.module in budget.shapes:
                run.progress(_PHASE, len(options), len(budget.shapes))
                base = places.original(place.weight)
                factor = Factor("whole", 1, piece_of(plan.sources, 1 + expert, base).ref)
                for ref in (base, factor.expert):
                    for chunk in opened.chunks(ref):
                        check_finite(plan, ref, chunk)
                delta_OI = read.difference(base, factor)
                size = float(np.square(delta_OI, dtype=np.float64).sum()) or 1.0
                costs = math.sqrt(known.get(place.module, 1 / size) / size)
                found = options_of(delta_OI, budget.itemsize)
                options[place.module] = [(price, error * costs, part) for price, error, part in found]
    return chosen(options, budget.most(plan.recipe.experts[expert]) - budget.fixed)


def options_of(delta_OI: Array32, itemsize: int) -> list[_Option]:
    """What can be kept of a difference, with its squared error: the cheapest first, then whatever errs least for its bytes."""
    smaller, shape = min(delta_OI.shape), delta_OI.shape
    most = smaller if smaller <= SMALL else _MOST_RANK
    energies_X, total = energies(delta_OI, most), float(np.square(delta_OI, dtype=np.float64).sum())
    left_X = total - np.cumsum(energies_X)
    left_X[left_X < _ROUNDING * total] = 0.0
    parts = [(Part(rank=rank), float(left)) for rank, left in enumerate(left_X, 1)]
    rows = delta_OI[:: -(-len(delta_OI) // _ROWS)]
    sample = float(np.square(rows, dtype=np.float64).sum())
    parts += [(Part(bits=bits), squared_error(rows, bits) * total / sample if sample else 0.0) for bits in BITS]
    priced = sorted((part.price(shape, itemsize), error, str(part), part) for part, error in [*parts, (Part(), 0.0)])
    return _hull([(price, error, part) for price, error, _, part in priced])


def _hull(options: Sequence[_Option]) -> list[_Option]:
    """Those on the lower convex hull of error by price, which begins with the cheapest."""
    hull: list[_Option] = []
    for option in options:
        if hull and option[1] >= hull[-1][1]:
            continue
        while hull and (option[0] == hull[-1][0] or (len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-2], option))):
            hull.pop()
        hull.append(option)
    return hull


def _gain(one: _Option, other: _Option) -> float:
    """Error that goes per byte that comes."""
    return (one[1] - other[1]) / max(1, other[0] - one[0])


def chosen(options: Mapping[str, Sequence[_Option]], most: int) -> dict[str, Part]:
    """A part per module, of `most` bytes together: from the cheapest on, always the step that gains most per byte."""
    at = dict.fromkeys(options, 0)
    left = most - sum(each[0][0] for each in options.values())
    queue = [(-_gain(each[0], each[1]), module) for module, each in options.items() if len(each) > 1]
    heapq.heapify(queue)
    while queue:
        _, module = heapq.heappop(queue)
        each, place = options[module], at[module]
        price = each[place + 1][0] - each[place][0]
        if price <= left:
            left -= price
            at[module] = place + 1
            if place + 2 < len(each):
                heapq.heappush(queue, (-_gain(each[place + 1], each[place + 2]), module))
    return {module: each[at[module]][2] for module, each in options.items()}


def _from_text(plan: Plan, expert: int, modules: Sequence[str], run: Run) -> dict[str, float]:
    """Module -> what a change of its weight by 1 (squared) does to the loss, twice; nothing where the expert has no text."""
    said, source = plan.recipe.experts[expert], plan.sources[1 + expert]
    if not (said.text or said.prompts):
        return {}
    documents = fit_documents(said, plan.root, expert, reads=plan.family.reads)
    read: _Sensitivities = resolve_name(_SENSITIVITIES)
    return read(source.folder, plan.sources[0].folder, documents, modules, run)
