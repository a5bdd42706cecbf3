"""Ways to run the experts of a recipe, side by side: what each loses on their own text, and what it costs.

    modekit    the modekit architecture, as the rules choose it
    native     a plain checkpoint, as they choose it for --native
    gateway    every expert's own model behind `modekit front`: nothing is lost, and all models stay in memory

Losses are those of an expert that is always chosen on its own text: a router loses some more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from modekit.errors import ModekitError
from modekit.planning.summary import PlanSummary
from modekit.search.advise.gains import ON_AVERAGE, Gains
from modekit.search.advise.models import ComparedModels
from modekit.search.advise.result import Facts, Recommendation, WayToRun
from modekit.search.advise.rules import carries_adapters
from modekit.sources.adapter import AdapterSource

Planned = tuple[Recommendation, PlanSummary]
"""What experts have of their own, and the plan that follows."""
WHOLE = "all"


def ways_of(
    compared: ComparedModels, gains: Gains | None, facts: Facts, kept: Mapping[int, bool], planned: Callable[[Facts], Planned]
) -> tuple[WayToRun, ...]:
    """The three ways. `planned` plans what the rules advise by facts; `kept` says which experts stand for themselves."""
    own = [index for index, is_own in kept.items() if is_own]
    mixtures = (_mixture(replace(facts, native=native), planned, gains, own) for native in (False, True))
    return (*mixtures, _gateway(compared, gains, own))


def _mixture(facts: Facts, planned: Callable[[Facts], Planned], gains: Gains | None, own: Sequence[int]) -> WayToRun:
    name = "native" if facts.native else "modekit"
    try:
        experts, plan = planned(facts)
    except ModekitError as error:
        return WayToRun(name=name, said=f"cannot be had: {error.what}")
    part = _part(experts, facts)
    loss, lost = _losses(gains, own, part)
    active, total = plan.parameters["active"], plan.parameters["total"]
    said = f"{plan.architecture}; of each expert {part}"
    less = _losses(gains, own, "ffn")[1]
    if facts.native and part == WHOLE and less is not None:
        said += f" but rounding (`modekit verify --deep`); with carry: ffn {less:.3f} nats are lost"
    return WayToRun(name=name, said=said, loss=loss, lost=lost, active=active, total=total, bytes=plan.bytes["written"])


def _part(experts: Recommendation, facts: Facts) -> str:
    """What the mixture has of every expert, as one of the parts that were scored."""
    if experts.mixture.get("backbone") == "average":
        return ON_AVERAGE
    if facts.native:
        return WHOLE if carries_adapters(facts) else "ffn"
    if experts.mixture.get("modules") == "all":
        return WHOLE
    return "ffn + attention" if facts.low_rank else "ffn"


def _losses(gains: Gains | None, own: Sequence[int], part: str) -> tuple[float | None, float | None]:
    """Mean loss over the experts' own text, and how much of it their own models do not have; nats per token."""
    known = [index for index in own if gains is not None and index in gains.parts]
    if gains is None or not known or any(part != WHOLE and part not in gains.parts[index] for index in known):
        return None, None
    whole = [gains.whole[index][index].mean for index in known]
    found = whole if part == WHOLE else [gains.parts[index][part].mean for index in known]
    return sum(found) / len(found), (sum(found) - sum(whole)) / len(found)


def _gateway(compared: ComparedModels, gains: Gains | None, own: Sequence[int]) -> WayToRun:
    """Own models in memory: the base once, with all adapters on it, and every full model."""
    sources = [compared.experts[index] for index in own]
    adapters = [source for source in sources if isinstance(source, AdapterSource)]
    full = [source for source in sources if not isinstance(source, AdapterSource)]
    with_base = [compared.base, *full]  # the base answers what is of no domain
    sizes = {id(each): sum(ref.numel for ref in each.tensors.values()) for each in (*with_base, *adapters)}
    loss, lost = _losses(gains, own, WHOLE)
    return WayToRun(
        name="gateway",
        said=f"models: {len(with_base)}" + (f", adapters: {len(adapters)}" if adapters else "") + "; one expert a text",
        loss=loss,
        lost=lost,
        active=max(sizes[id(each)] for each in with_base) + max((sizes[id(each)] for each in adapters), default=0),
        total=sum(sizes.values()),
        bytes=sum(ref.nbytes for each in (*with_base, *adapters) for ref in each.tensors.values()),
    )
