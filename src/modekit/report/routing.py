"""inspect.json as a page shows it: routers gathered where they are too many, sample texts within the page's room."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import zip_longest

from modekit.evaluation.inspection.result import DomainTrace, Inspection
from modekit.recipes.layers import Layer, order_of
from modekit.sources.family import Family

SAMPLE_BYTES = 900_000
"""Room for the sample texts' weights in a page of 2 MB."""
_HEAT_CELLS = 4_000  # more routers than that many cells hold are averaged over a layer, then over neighbouring layers
_SHORTEST_SAMPLE = 16  # tokens


def routing_of(inspection: Inspection) -> dict[str, object]:
    """What inspect.json says, but for the samples, with the routers gathered where they are too many to show."""
    every = [*inspection.domains, *inspection.unseen]
    evidence = inspection.evidence
    groups = _groups(inspection)
    per_domain = {}
    for name in every:
        usage = inspection.per_domain[name]
        per_domain[name] = {
            **usage.model_dump(include={"expert", "documents", "tokens", "loss", "named"}),
            "shares": _gathered(usage.shares, groups),
            "mean_share": _mean_row(usage.shares),
            "agreement": _mean(usage.agreement),
            "entropy": _mean(usage.entropy),
            "without": {expert: usage.without.get(expert) for expert in inspection.experts},
        }
    return {
        **inspection.model_dump(include={"experts", "domains", "unseen", "similarity", "told_apart", "notes"}),
        "rows": [_label(inspection, group) for group in groups],
        "per_domain": per_domain,
        "utilisation": _gathered(inspection.utilisation, groups),
        "mean_utilisation": _mean_row(inspection.utilisation),
        "dead": [
            {"router": _router_label(inspection, dead.router), "expert": dead.expert}
            for dead in inspection.dead
            if 0 <= dead.router < len(inspection.routers)
        ],
        "top_tokens": {name: inspection.top_tokens.get(name, [])[:12] for name in inspection.experts},
        "evidence": evidence and {name: evidence.get(name, [])[:12] for name in inspection.experts},
    }


def _groups(inspection: Inspection) -> list[list[int]]:
    """Routers that share a row of the heat map: each its own, those of a layer, or those of neighbouring layers."""
    most = max(8, _HEAT_CELLS // max(1, len(inspection.per_domain) * len(inspection.experts)))
    groups = [[place] for place in range(len(inspection.routers))]
    if len(groups) > most:
        layers: dict[Layer | None, list[int]] = {}
        for place, router in enumerate(inspection.routers):
            layers.setdefault(router.layer, []).append(place)
        groups = list(layers.values())
    step = math.ceil(len(groups) / most) if groups else 1
    return [[place for group in groups[start : start + step] for place in group] for start in range(0, len(groups), step)]


def _label(inspection: Inspection, group: Sequence[int]) -> str:
    if len(group) == 1:
        return _router_label(inspection, group[0])
    layers = sorted(
        {layer for layer in (inspection.routers[place].layer for place in group) if layer is not None}, key=order_of
    )
    if not layers:
        return "model"
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"


def _router_label(inspection: Inspection, place: int) -> str:
    router = inspection.routers[place]
    if router.layer is None:
        return router.module or "whole model"
    alone = inspection.in_layer[router.layer] == 1
    return f"layer {router.layer}" if alone or not router.module else f"layer {router.layer} {router.module}"


def _gathered(rows: Sequence[Sequence[float]], groups: Sequence[Sequence[int]]) -> list[list[float]]:
    return [_mean_row([rows[place] for place in group]) for group in groups]


def _mean_row(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def _mean(values: Sequence[float] | None) -> float | None:
    return sum(values) / len(values) if values else None


def samples_of(inspection: Inspection, family: Family) -> dict[str, object]:
    """Sample texts with their weights in thousandths: one of each domain first, as many as there is room for.

    Of a pair `source` says how many tokens stand before the target; of a text it is 0.
    """
    by_domain: dict[str, list[DomainTrace]] = {}
    for sample in inspection.texts:
        by_domain.setdefault(sample.domain, []).append(sample)
    order = [sample for turn in zip_longest(*by_domain.values()) for sample in turn if sample is not None]
    kept: list[dict[str, object]] = []
    room = SAMPLE_BYTES
    for place, sample in enumerate(order):
        data = _sample_within(sample, SAMPLE_BYTES // len(by_domain) if place < len(by_domain) else room, inspection)
        if data is None:
            break
        target = next((place for place, token in enumerate(sample.tokens) if token.loss is not None), len(sample.tokens))
        kept.append({**data, "source": target if family.pair else 0})
        room -= _size(data)
    routers = [_router_label(inspection, place) for place in range(len(inspection.routers))]
    return {"routers": routers, "texts": kept, "left_out": len(order) - len(kept)}


def _sample_within(sample: DomainTrace, room: int, inspection: Inspection) -> dict[str, object] | None:
    """The beginning of a sample that fits; None when that is too short to be worth showing."""
    most = len(sample.tokens)
    while most >= min(_SHORTEST_SAMPLE, len(sample.tokens)) and most:
        data = _sample(sample, most, inspection)
        size = _size(data)
        if size <= room:
            return data
        most = min(most - 1, int(most * room / size))
    return None


def _size(data: object) -> int:
    return len(json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode())


def _sample(sample: DomainTrace, most: int, inspection: Inspection) -> dict[str, object]:
    tokens = [{"text": token.text, "loss": token.loss} for token in sample.tokens[:most]]
    weights = [[[round(1000 * weight) for weight in row] for row in router[:most]] for router in sample.weights]
    without = {expert: sample.without.get(expert) for expert in inspection.experts}
    return {
        "domain": sample.domain,
        "loss": sample.loss,
        "tokens": tokens,
        "weights": weights,
        "without": without,
        "cut": len(sample.tokens) - len(tokens),
    }
