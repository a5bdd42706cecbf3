"""Everything a report shows, as plain data. report.json is this; page and plots are made from it and nothing else.

Losses in nats per token, shares and weights between 0 and 1, numbers to 6 significant digits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any, TypeVar

import yaml

from modekit.checkpoint import STATISTICS_FOLDER, Checkpoint
from modekit.evaluate import Results, parameters_of
from modekit.licences import Source, facts, sources_of
from modekit.plan import backbone_label
from modekit.report.found import (
    Curve,
    Inspection,
    Sample,
    Trained,
    find_inspection,
    find_results,
    find_tasks,
    find_training,
)

_Each = TypeVar("_Each")
SAMPLE_BYTES = 900_000
"""Room for the sample texts' weights in a page of 2 MB."""
_HEAT_CELLS = 4_000  # more routers than that many cells hold are averaged over a layer, then over neighbouring layers
_SHORTEST_SAMPLE = 16  # tokens
_POINTS = 400  # of a curve; more are thinned


def make_content(checkpoint: Checkpoint) -> dict[str, Any]:
    """Read what is there about a checkpoint; what is missing is null, and `missing` says why and what to run."""
    missing: list[str] = []
    results = find_results(checkpoint, missing)
    inspection = find_inspection(checkpoint, missing)
    trained, tasks = find_training(checkpoint, missing), find_tasks(checkpoint, missing)
    sources = sources_of(checkpoint)
    content: dict[str, Any] = rounded(
        {
            "format": 1,
            "name": checkpoint.folder.name,
            "modekit_version": checkpoint.record.modekit_version,
            "mixture": _mixture(checkpoint),
            "sizes": _sizes(checkpoint),
            "results": _results(results) if results is not None else None,
            "routing": _routing(inspection) if inspection is not None else None,
            "samples": _samples(inspection) if inspection is not None else None,
            "training": _training(checkpoint, trained),
            "tasks": tasks.model_dump() if tasks is not None and tasks.tasks else None,
            # A search writes tune.json; what it tried has its place here, and a section after "tasks" in page.html.jinja.
            "provenance": _provenance(checkpoint, results),
            "licences": {"sources": [_licence(source) for source in sources], "facts": facts(sources)},
            "missing": missing,
        }
    )
    return content


def rounded(value: Any) -> Any:
    """The same data with floats to 6 significant digits, and null for what is not finite."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, (list, tuple)) else value


def _mixture(checkpoint: Checkpoint) -> dict[str, Any]:
    record, recipe = checkpoint.record, checkpoint.record.recipe
    linear = recipe.mixture.method == "linear"
    return {
        "architecture": str(checkpoint.config["architectures"][0]),
        "native": checkpoint.native is not None,
        "experts": checkpoint.names,
        "method": recipe.mixture.method,
        "top_k": recipe.top_k,
        "top_p": recipe.mixture.top_p,
        "router": "fixed weights" if linear else recipe.mixture.router.fit,
        "granularity": "none" if linear else recipe.mixture.router.granularity,
        "status": record.router.status,
        "backbone": backbone_label(recipe),
        "layers": checkpoint.layers,
        "dtype": str(checkpoint.config["dtype"]),
        "trainings": len(record.training),
    }


def _sizes(checkpoint: Checkpoint) -> dict[str, Any]:
    total, active, dense = parameters_of(checkpoint)
    files = sorted({ref.file for ref in checkpoint.tensors.values()})
    statistics = checkpoint.folder / STATISTICS_FOLDER
    kept = sum(path.stat().st_size for path in statistics.glob("*.safetensors")) if statistics.is_dir() else 0
    gates = sum(checkpoint.tensors[slot.name].numel for slot in checkpoint.slots)
    return {
        "parameters": {
            "total": total, "active": active, "dense": dense, "gates": gates,
            "total_of_dense": total / dense, "active_of_dense": active / dense,
        },
        "bytes": {"weights": sum(file.stat().st_size for file in files), "statistics": kept},
        "routers": len(checkpoint.slots),
    }  # fmt: skip


def _results(results: Results) -> dict[str, Any]:
    """The table, and for every row means with their standard errors (domains' texts are independent)."""
    rows = []
    for row in results.rows:
        scores = {
            name: {key: value for key, value in vars(score).items() if key != "blocks"} for name, score in row.scores.items()
        }
        with_gap = [score for name, score in row.scores.items() if name in results.domains and score.gap_closed is not None]
        rows.append(
            {
                "name": row.name, "kind": row.kind, "domains": scores,
                "total_parameters": row.total_parameters, "active_parameters": row.active_parameters,
                "mean": {
                    "loss": row.mean_loss(results.domains) if results.domains else None,
                    "gap_closed": row.mean_gap(results.domains),
                    "gap_error": _mean_error([score.gap_error for score in with_gap]),
                },
            }
        )  # fmt: skip
    every = [*results.domains, *results.unseen]
    lowest = {name: _best([(row.name, row.scores[name].loss) for row in results.rows if name in row.scores]) for name in every}
    text = {name: dict(results.text[name]) for name in every if name in results.text}
    return {
        "domains": list(results.domains), "unseen": list(results.unseen), "rows": rows, "text": text,
        "lowest": lowest, "against_base": _against_base(results), "notes": list(results.notes),
    }  # fmt: skip


def _against_base(results: Results) -> dict[str, dict[str, float]]:
    """Loss less the base's, by row and domain; empty without a base."""
    base = next((row for row in results.rows if row.kind == "base"), None)
    if base is None:
        return {}
    return {
        row.name: {name: score.loss - base.scores[name].loss for name, score in row.scores.items() if name in base.scores}
        for row in results.rows
    }


def _best(losses: Sequence[tuple[str, float]]) -> str | None:
    return min(losses, key=lambda pair: pair[1])[0] if losses else None


def _mean_error(errors: Sequence[float | None]) -> float | None:
    known = [error for error in errors if error is not None]
    return math.sqrt(sum(error**2 for error in known)) / len(known) if known and len(known) == len(errors) else None


def _routing(inspection: Inspection) -> dict[str, Any]:
    """What inspect.json says, but for the samples, with the routers gathered where they are too many to show."""
    every = [*inspection.domains, *inspection.unseen]
    groups = _groups(inspection, len(every))
    per_domain = {}
    for name in every:
        usage = inspection.per_domain[name]
        per_domain[name] = {
            "expert": usage.expert, "documents": usage.documents, "tokens": usage.tokens, "loss": usage.loss,
            "shares": _gathered(usage.shares, groups), "mean_share": _mean_row(usage.shares),
            "agreement": _mean(usage.agreement), "entropy": _mean(usage.entropy),
            "without": {expert: usage.without.get(expert) for expert in inspection.experts}, "named": usage.named,
        }  # fmt: skip
    return {
        "experts": inspection.experts, "domains": inspection.domains, "unseen": inspection.unseen,
        "rows": [_label(inspection, group) for group in groups], "per_domain": per_domain,
        "utilisation": _gathered(inspection.utilisation, groups),
        "mean_utilisation": _mean_row(inspection.utilisation),
        "dead": [
            {"router": _router_label(inspection, dead.router), "expert": dead.expert}
            for dead in inspection.dead if 0 <= dead.router < len(inspection.routers)
        ],
        "similarity": inspection.similarity.model_dump() if inspection.similarity is not None else None,
        "top_tokens": {
            name: [token.model_dump() for token in inspection.top_tokens.get(name, [])][:12] for name in inspection.experts
        },
        "notes": inspection.notes,
    }  # fmt: skip


def _groups(inspection: Inspection, domains: int) -> list[list[int]]:
    """Routers that share a row of the heat map: each its own, those of a layer, or those of neighbouring layers."""
    most = max(8, _HEAT_CELLS // max(1, domains * len(inspection.experts)))
    groups = [[place] for place in range(len(inspection.routers))]
    if len(groups) > most:
        layers: dict[int | None, list[int]] = {}
        for place, router in enumerate(inspection.routers):
            layers.setdefault(router.layer, []).append(place)
        groups = list(layers.values())
    step = math.ceil(len(groups) / most) if groups else 1
    return [[place for group in groups[start : start + step] for place in group] for start in range(0, len(groups), step)]


def _label(inspection: Inspection, group: Sequence[int]) -> str:
    if len(group) == 1:
        return _router_label(inspection, group[0])
    layers = sorted({layer for layer in (inspection.routers[place].layer for place in group) if layer is not None})
    if not layers:
        return "model"
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"


def _router_label(inspection: Inspection, place: int) -> str:
    router = inspection.routers[place]
    if router.layer is None:
        return router.module or "whole model"
    alone = sum(other.layer == router.layer for other in inspection.routers) == 1
    return f"layer {router.layer}" if alone or not router.module else f"layer {router.layer} {router.module}"


def _gathered(rows: Sequence[Sequence[float]], groups: Sequence[Sequence[int]]) -> list[list[float]]:
    return [_mean_row([rows[place] for place in group]) for group in groups]


def _mean_row(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def _mean(values: Sequence[float] | None) -> float | None:
    return sum(values) / len(values) if values else None


def _samples(inspection: Inspection) -> dict[str, Any]:
    """Sample texts with their weights in thousandths: one of each domain first, as many as there is room for."""
    by_domain: dict[str, list[Sample]] = {}
    for sample in inspection.texts:
        by_domain.setdefault(sample.domain, []).append(sample)
    order = [sample for turn in zip_longest(*by_domain.values()) for sample in turn if sample is not None]
    kept, room = [], SAMPLE_BYTES
    for place, sample in enumerate(order):
        data = _sample_within(sample, SAMPLE_BYTES // len(by_domain) if place < len(by_domain) else room, inspection)
        if data is None:
            break
        kept.append(data)
        room -= _size(data)
    routers = [_router_label(inspection, place) for place in range(len(inspection.routers))]
    return {"routers": routers, "texts": kept, "left_out": len(order) - len(kept)}


def _sample_within(sample: Sample, room: int, inspection: Inspection) -> dict[str, Any] | None:
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


def _sample(sample: Sample, most: int, inspection: Inspection) -> dict[str, Any]:
    tokens = [{"text": token.text, "loss": token.loss} for token in sample.tokens[:most]]
    weights = [[[round(1000 * weight) for weight in row] for row in router[:most]] for router in sample.weights]
    without = {expert: sample.without.get(expert) for expert in inspection.experts}
    return {
        "domain": sample.domain, "loss": sample.loss, "tokens": tokens, "weights": weights, "without": without,
        "cut": len(sample.tokens) - len(tokens),
    }  # fmt: skip


def _training(checkpoint: Checkpoint, trained: Trained | None) -> dict[str, Any] | None:
    records = checkpoint.record.training
    if not records:
        return None
    return {
        "runs": [
            {
                "what": record.settings.get("what"), "losses": record.settings.get("losses"),
                "speed": record.settings.get("speed"), "steps": record.steps, "tokens": record.tokens,
                "parameters": record.parameters, "select_loss": _in_order(record.select_loss, checkpoint.names),
                "notes": record.notes,
            }
            for record in records
        ],
        "results": _results(trained.results) if trained is not None and trained.results is not None else None,
        "curve": _curve(trained.curve, list(_in_order(records[-1].select_loss, checkpoint.names)))
        if trained is not None and trained.curve is not None
        else None,
    }  # fmt: skip


def _curve(curve: Curve, domains: Sequence[str]) -> dict[str, Any]:
    """Losses as [step, loss] points: of the training text, and held-out by domain and their mean."""

    def points(*names: str) -> list[list[float]]:
        values = next((curve.columns[name] for name in names if name in curve.columns), [])
        found = [[step, value] for step, value in zip(curve.steps, values, strict=False) if value is not None]
        return found[:: math.ceil(len(found) / _POINTS) or 1]

    held_out = {name: points(f"eval_{name}_loss", f"eval_{name}") for name in domains}
    return {
        "training": points("loss"), "mean": points("eval_loss"), 
        "domains": {name: each for name, each in held_out.items() if each},
    }  # fmt: skip


def _provenance(checkpoint: Checkpoint, results: Results | None) -> dict[str, Any]:
    record = checkpoint.record
    recipe = yaml.safe_dump(record.model_dump(mode="json")["recipe"], sort_keys=False, allow_unicode=True, width=100)
    scored = {name: dict(results.text[name]) for name in [*results.domains, *results.unseen]} if results is not None else {}
    return {
        "recipe": recipe,
        "recipe_digest": record.recipe_digest,
        "router_sha256": record.router.sha256,
        "sources": [
            {
                "label": source.label, "spec": source.spec, "revision": source.revision,
                "files": [{"name": name, "size": file.size, "blake3": file.blake3} for name, file in source.files.items()],
            }
            for source in record.sources
        ],
        "texts": {"fit": _texts(_in_order(record.router.text, checkpoint.names)), "scored": _texts(scored)},
        "trained_tensors": len(record.trained),
    }  # fmt: skip


def _in_order(texts: dict[str, _Each], names: Sequence[str]) -> dict[str, _Each]:
    return {name: texts[name] for name in [*names, *sorted(texts.keys() - set(names))] if name in texts}


def _texts(texts: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    keys: Sequence[tuple[str, Callable[[Any], bool]]] = (
        ("documents", lambda value: isinstance(value, int)), ("tokens", lambda value: isinstance(value, int)),
        ("sha256", lambda value: isinstance(value, str)),
    )  # fmt: skip
    return {
        name: {key: text[key] if key in text and is_kind(text[key]) else None for key, is_kind in keys}
        for name, text in texts.items()
    }


def _licence(source: Source) -> dict[str, Any]:
    return {
        "used_as": list(source.used_as), "spec": source.spec, "revision": source.revision, "licence": source.said,
        "link": source.licence_link, "found": source.found, "known": source.licence is not None,
    }  # fmt: skip
