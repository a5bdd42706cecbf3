"""A classifier of the mean of what a router reads over a text's first tokens: scikit-learn on the inputs that a fit keeps.

Its gate is linear and has no intercept, as all gates that read hidden states, so the classifiers are fitted without one. What
they are compared on, and the temperature chosen by, are the last tenth of every domain's kept inputs: those of its last
documents of the fit split, since the select split is not run through the models.

Shape legend: D width of what a gate takes, E experts, N kept inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from modekit.checkpoint.record import RouterRecord
from modekit.errors import RecipeError
from modekit.processes import processes
from modekit.recipes.libraries import check_library
from modekit.recipes.router import Router
from modekit.routing.fitting import FittedRouter, Fitting
from modekit.routing.solve import read_domains
from modekit.routing.statistics import DomainStatistics

_ASIDE = 10


def hidden_gates(fitting: Fitting) -> FittedRouter:
    """The gate of the one router; the other processes' is empty. Raises TextError, and RecipeError without scikit-learn."""
    check_library(fitting.settings.row)
    domains = read_domains(fitting)
    if not processes().is_main:
        return FittedRouter([], RouterRecord.unfitted(fitting.recipe))
    fitting.run.begin("fit classifiers")
    gate_ED, said = _fitted(domains, fitting.settings)
    text = {name: each.source["text"] for name, each in zip(fitting.recipe.names, domains, strict=True)}
    report = {"tokens": [domain.tokens for domain in domains], **said}
    record = RouterRecord(status="fitted", settings=fitting.settings, sha256="", text=text, report=report)
    return FittedRouter([gate_ED], record)


def _fitted(domains: Sequence[DomainStatistics], settings: Router) -> tuple[npt.NDArray[np.float32], dict[str, object]]:
    """The gate (E, D), and what the record says of it."""
    from modekit.routing.classifiers import CLASSIFIERS, choose, report_of

    kept = [domain.slots[0].sample_ND.double().numpy() for domain in domains]
    if not all(map(len, kept)):
        raise RecipeError(
            "the classifier needs kept inputs and there are none",
            where="mixture.router.keep_tokens",
            expected="at least 1",
            remedy="fit again with keep_tokens > 0",
        )
    scale = np.sqrt(np.mean([np.square(each).mean() for each in kept])) or 1.0
    split = [max(1, len(each) - len(each) // _ASIDE) for each in kept]
    held = [each[at:] / scale for each, at in zip(kept, split, strict=True)]
    own = [each[:at] / scale for each, at in zip(kept, split, strict=True)]
    chosen = choose(settings.classifiers(CLASSIFIERS), own, held, settings.seed)
    gate_ED = chosen.linear.weights_EV / (scale * settings.temperature)
    return gate_ED.astype(np.float32), report_of(chosen, held)
