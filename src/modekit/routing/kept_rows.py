"""A trained router over experts that come and go: the rows of those that stay are what the training made them, and a new
expert's row is fitted beside them.

The new row of a gate minimises what the logistic fit minimises, the cross-entropy of the kept tokens' domains, with the
other rows held still (closed_form.py).

Shape legend: D width of what a gate takes, E experts, R rows of a gate for one expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.record import RouterRecord
from modekit.errors import RecipeError
from modekit.planning.reuse import Origins
from modekit.planning.shape import RouterSlot
from modekit.routing.closed_form import logistic_beside
from modekit.routing.fitting import FittedRouter, Fitting
from modekit.routing.inputs import read_domains

_Gate = npt.NDArray[np.float32]


def trained_gates(fitting: Fitting, before: Checkpoint, origins: Origins) -> FittedRouter:
    """Gates for the experts of a checkpoint, of which `origins` says who they were in `before`, whose router was trained.

    Raises RecipeError where the rows of a gate do not stand by themselves, or a new one cannot be fitted.
    """
    slots, record = fitting.checkpoint.slots, before.record.router
    _check(fitting, before, origins)
    old = dict(zip((slot.name for slot in before.slots), zip(before.slots, before.gates(), strict=True), strict=True))
    gates = [_rows_that_stay(slot, *old[slot.name], origins) for slot in slots]
    new = [place for place, origin in enumerate(origins) if origin is None]
    was = {before.names[origin]: name for name, origin in zip(fitting.recipe.names, origins, strict=True) if origin is not None}
    text = {was[name]: said for name, said in record.text.items() if name in was}
    if new:
        domains = read_domains(fitting)
        for number, gate in enumerate(gates):
            gate[new] = logistic_beside(number, domains, fitting.settings, torch.from_numpy(gate), new).numpy()
        text = {expert.name: each.source["text"] for expert, each in zip(fitting.recipe.experts, domains, strict=True)}
    said = RouterRecord(status="trained", settings=record.settings, sha256="", text=text, report=record.report)
    return FittedRouter(gates, said)


def _check(fitting: Fitting, before: Checkpoint, origins: Origins) -> None:
    fit = fitting.recipe.mixture.fit
    names = [slot.name for slot in before.slots]
    alone = fitting.checkpoint.shape.channels is None and [slot.name for slot in fitting.checkpoint.slots] == names
    alone = alone and not any(slot.features or slot.shared for slot in before.slots)
    one_row = all(set(slot.rows) == {1} for slot in fitting.checkpoint.slots)
    if alone and (None not in origins or (fit is not None and fit.runs_models and one_row)):
        return
    found = f"fit: {fit.name}" if alone and fit is not None else "a router that is set as a whole"
    raise RecipeError(
        "the router was trained, and who is in the mixture cannot change beside what the training made",
        where=str(before.folder),
        found=found,
        remedy="pass --refit, which sets it again from the text and the kept statistics, and train it again afterwards",
    )


def _rows_that_stay(slot: RouterSlot, was: RouterSlot, gate: _Gate, origins: Origins) -> _Gate:
    """A gate with the rows of experts that were there, and zeros for the others."""
    if was.shape[1] != slot.shape[1]:
        raise RecipeError("the router reads something else than before", where=slot.name, remedy="pass --refit")
    starts = np.cumsum([0, *was.rows])
    blocks: Sequence[_Gate] = [
        np.zeros((rows, slot.shape[1]), np.float32) if origin is None else gate[starts[origin] : starts[origin + 1]]
        for rows, origin in zip(slot.rows, origins, strict=True)
    ]
    return np.concatenate(blocks)
