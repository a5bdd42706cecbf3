"""Which rank every module of an expert with a budget gets: parameters go where they change the loss most.

To second order, and with inputs and gradients of a module taken as independent of each other and alike in all directions
(K-FAC, arXiv:1503.05671, with two numbers per module in place of two matrices), leaving out the singular values s of the
difference of a weight costs

    1/2 E[x^2] E[g^2] sum s^2        x inputs of the module, g gradients of the loss by its outputs, mean squares of a number

which the expert's own model tells on the fit split of its text. Without text a module's part is taken in proportion to its
weight, 1 / |W|^2. The next rank always goes to the module that gains most per parameter.

Shape legend: O outputs, I inputs.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from modekit.building.tensors import PieceReader
from modekit.planning.budgets import Budget
from modekit.planning.make import plan_of
from modekit.planning.pieces import Factor, piece_of
from modekit.planning.places import Places
from modekit.planning.plan import Plan
from modekit.run import QUIET, Run
from modekit.sources.contents import OpenFiles
from modekit.sources.model import TensorRef
from modekit.text.held_out import fit_documents
from modekit.text.sequences import encode, none_fits
from modekit.weights.factorise import energies
from modekit.weights.numeric import blocks, to_float32
from modekit.weights.stored import Stored

_PHASE = "choose ranks"
_TOKENS = 8_192  # of an expert's text
_SEQUENCE_LENGTH = 512
_BEYOND = 4  # of a large weight so many times the even rank is looked at


def settled(plan: Plan, *, run: Run = QUIET) -> Plan:
    """The plan with ranks for every expert whose recipe gives a budget alone; the plan itself where there is none.

    Raises SourceError for weights that are not finite, and TextError.
    """
    experts = list(plan.recipe.experts)
    missing = [place for place, said in enumerate(experts) if said.budget is not None and said.ranks is None]
    if not missing:
        return plan
    places = Places(plan.recipe, plan.sources, plan.family)
    for expert in missing:
        ranks = _ranks(plan, places, expert, run.about(experts[expert].name))
        experts[expert] = experts[expert].model_copy(update={"ranks": ranks})
    return plan_of(plan.recipe.model_copy(update={"experts": experts}), plan.root, plan.sources, run=run)


def _ranks(plan: Plan, places: Places, expert: int, run: Run) -> dict[str, int]:
    budget, said = places.budget(expert), plan.recipe.experts[expert]
    even, most = budget.even(said, said.name), int((said.budget or 0) * budget.base)
    known = _from_text(plan, expert, list(budget.shapes), run)
    worth: dict[str, npt.NDArray[np.float64]] = {}
    with OpenFiles() as opened:
        read = PieceReader(opened)
        for place in places:
            if place.module in budget.shapes:
                run.progress(_PHASE, len(worth), len(budget.shapes))
                full = piece_of(plan.sources, 1 + expert, place.weight).ref
                found = energies(read.difference(place.weight, Factor("whole", 1, full)), _BEYOND * even)
                worth[place.module] = found * (known[place.module] if known else 1 / _squared(read, place.weight))
    return chosen(budget, worth, most)


def _from_text(plan: Plan, expert: int, modules: Sequence[str], run: Run) -> dict[str, float]:
    """Module -> what a change of its weight by 1 (squared) does to the loss, twice; nothing where the expert has no text."""
    said, source = plan.recipe.experts[expert], plan.sources[1 + expert]
    if not (said.text or said.prompts):
        return {}
    from modekit.loaded.load import load_model, load_tokenizer
    from modekit.loaded.moments import sensitivities

    documents = fit_documents(said, plan.root, expert, reads=plan.family.reads)
    tokenizer = load_tokenizer(plan.sources[0].folder, run=run)
    sequences = encode(tokenizer, documents, max_tokens=_TOKENS, sequence_length=_SEQUENCE_LENGTH)
    if not sequences:
        raise none_fits(documents, _SEQUENCE_LENGTH, where=f"experts[{expert}] '{said.name}'", most=_TOKENS)
    return sensitivities(load_model(source.folder, run=run), modules, sequences, advance=partial(run.progress, "read text"))


def _squared(read: PieceReader, ref: TensorRef) -> float:
    """The squared norm of a stored weight; 1 where it is zero."""
    stored = Stored(read.opened, ref)
    parts = (to_float32(stored[part]) for part in blocks(len(stored)))
    return sum(float(np.square(part, dtype=np.float64).sum()) for part in parts) or 1.0


def chosen(budget: Budget, worth: Mapping[str, npt.NDArray[np.float64]], most: int) -> dict[str, int]:
    """Ranks that take `most` parameters together at most, 1 or more each, by what each further one is worth."""
    ranks = dict.fromkeys(budget.shapes, 1)
    left = most - budget.taken(ranks)

    def next_of(module: str) -> tuple[float, str]:
        return -float(worth[module][ranks[module]]) / sum(budget.shapes[module]), module

    queue = [next_of(module) for module in ranks if len(worth[module]) > 1]
    heapq.heapify(queue)
    while queue:
        _, module = heapq.heappop(queue)
        outputs, inputs = budget.shapes[module]
        price = max(0, min(outputs + inputs, outputs * inputs - ranks[module] * (outputs + inputs)))
        if price <= left:
            left -= price
            ranks[module] += 1
            if ranks[module] < len(worth[module]):
                heapq.heappush(queue, next_of(module))
    return ranks
