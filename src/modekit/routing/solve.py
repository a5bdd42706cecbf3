"""Gates solved router by router from what the routers read: text once under each expert, then the row's rule."""

from __future__ import annotations

from modekit.checkpoint.record import RouterRecord
from modekit.processes import processes
from modekit.routing.closed_form import fit_gates
from modekit.routing.fitting import FittedRouter, Fitting
from modekit.routing.read import Reader
from modekit.routing.statistics import DomainStatistics


def solve_gates(fitting: Fitting) -> FittedRouter:
    """Read what is not kept, and solve in the main process; the others' gates are empty. Raises TextError."""
    settings, experts = fitting.settings, fitting.recipe.experts
    whole = read_domains(fitting)
    if not processes().is_main:
        return FittedRouter([], RouterRecord.unfitted(fitting.recipe))
    slots = fitting.checkpoint.slots
    done = 0
    fitting.run.begin(f"solve {settings.fit}", len(slots))

    def advance(count: int) -> None:
        nonlocal done
        done += count
        fitting.run.progress(f"solve {settings.fit}", done, len(slots))

    solved = fit_gates(settings, whole, advance)
    # A gate with one decision per output feature starts as one decision for all of them.
    gates = [gate.repeat(max(1, slot.features), 1).numpy() for gate, slot in zip(solved, slots, strict=True)]
    text = {expert.name: domain.source["text"] for expert, domain in zip(experts, whole, strict=True)}
    report = {"tokens": [domain.tokens for domain in whole]}
    return FittedRouter(gates, RouterRecord(status="fitted", settings=settings, sha256="", text=text, report=report))


def read_domains(fitting: Fitting) -> list[DomainStatistics]:
    """Statistics of every expert's domain, kept or read now; of all of them in the main process only. Raises TextError."""
    reader = Reader(fitting)
    # All text is looked at before any is read through the model: what is wrong with the last shows at once.
    looked_at = []
    for place, expert in enumerate(fitting.recipe.experts):
        fitting.run.begin(f"tokenise {expert.name}")
        looked_at.append(reader.look_at(place, expert))
    reader.expect(looked_at)
    domains = [reader.read(domain) for domain in looked_at]
    return [domain for domain in domains if domain is not None]
