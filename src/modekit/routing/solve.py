"""Gates solved from what the routers read: text once under each expert, then router by router, or one classifier."""

from __future__ import annotations

from modekit.processes import processes
from modekit.routing.closed_form import fit_gates
from modekit.routing.fitting import FittedRouter, Fitting
from modekit.routing.read import StatisticsReader
from modekit.routing.statistics import DomainStatistics


def solve_gates(fitting: Fitting) -> FittedRouter:
    """Read what is not kept, and solve in the main process; the others' gates are empty. Raises TextError and RecipeError."""
    domains, settings = read_domains(fitting), fitting.settings
    if not processes().is_main:
        return fitting.unfitted()
    text, report = [domain.source["text"] for domain in domains], {"tokens": [domain.tokens for domain in domains]}
    if settings.row.library:
        from modekit.routing.classifiers import hidden_gate

        fitting.run.begin("fit classifiers")
        gate_ED, choice = hidden_gate([domain.slots[0].sample_ND.double().numpy() for domain in domains], settings)
        return fitting.fitted([gate_ED], text, {**report, **choice})
    solved = zip(fit_gates(settings, domains, fitting.run), fitting.checkpoint.slots, strict=True)
    # A gate with one decision per output feature starts as one decision for all of them.
    return fitting.fitted([gate.repeat(max(1, slot.features), 1).numpy() for gate, slot in solved], text, report)


def read_domains(fitting: Fitting) -> list[DomainStatistics]:
    """Statistics of every expert's domain, kept or read now; of all of them in the main process only. Raises TextError."""
    reader = StatisticsReader(fitting)
    # All text is looked at before any is read through the model: what is wrong with the last shows at once.
    looked_at = []
    for place, expert in enumerate(fitting.recipe.experts):
        fitting.run.begin(f"tokenise {expert.name}")
        looked_at.append(reader.look_at(place, expert))
    reader.expect(looked_at)
    domains = [reader.read(domain) for domain in looked_at]
    return [domain for domain in domains if domain is not None]
